"""`kvstore throttle`."""

import json
from typing import Annotated

import typer

from kvstore_api.address import DEFAULT_ADDRESS
from kvstore_codec.errors import ConfigurationError
from kvstore_service.cli import options

_OFF = "off"


def throttle(
    bandwidth: Annotated[
        str | None,
        typer.Argument(help="Such as 50mbit or 1gbit, from 100kbit on; `off` takes the limit away."),
    ] = None,
    node: Annotated[
        str | None, typer.Option(help="Id of one node, as `kvstore status` shows it; default: each of them.")
    ] = None,
    address: options.Address = DEFAULT_ADDRESS,
    json_output: options.Json = False,
) -> None:
    """Limit how fast storage nodes send to readers, for experiments. Without arguments, list the limits.

    Each node has the whole bandwidth, and all its connections share it. Nothing is remembered: a node that restarts has
    no limit.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from kvstore_service.admin import ClusterAdmin
    from kvstore_service.link import format_bandwidth, parse_bandwidth
    from kvstore_service.listen import Address

    if node is not None and bandwidth is None:
        raise ConfigurationError(f"how fast may {node} send? Write a bandwidth, such as 50mbit, or off")
    limit_bps = None if bandwidth in (None, _OFF) else parse_bandwidth(str(bandwidth))
    with ClusterAdmin(str(Address.parse(address))) as cluster:
        if bandwidth is not None:
            for chosen in cluster.nodes(node):
                chosen.throttle(limit_bps)
        nodes = [found for found in cluster.stats().nodes if found.alive]
    limits = {found.member.node_id: found.stats.gauges.get("throttle_bps") for found in nodes}
    if json_output:
        rows = [{"node_id": name, "bandwidth_bps": limit} for name, limit in limits.items()]
        typer.echo(json.dumps({"nodes": rows}, indent=2))
        return
    table = Table("node", "limit", title=escape(f"sending at {address}"))
    for name, limit in limits.items():
        table.add_row(escape(name), format_bandwidth(limit) if limit else "none")
    Console().print(table)
