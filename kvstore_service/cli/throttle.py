"""`kvstore throttle`."""

import json
from typing import Annotated

import typer

from kvstore_api.address import DEFAULT_ADDRESS
from kvstore_codec.errors import ConfigurationError
from kvstore_service.cli import options
from kvstore_service.cli.console import print_table

_OFF = "off"


def throttle(
    bandwidth: Annotated[
        str | None,
        typer.Argument(
            help="A bandwidth such as 50mbit or 1gbit, at least 100kbit; `off` removes all limits."
        ),
    ] = None,
    disk: Annotated[
        str | None, typer.Option(help="A rate such as 160MB/s, at least 1MB/s; `off` removes this limit.")
    ] = None,
    node: Annotated[
        str | None, typer.Option(help="Id of one node, as `kvstore status` shows it; default: all nodes.")
    ] = None,
    address: options.Address = DEFAULT_ADDRESS,
    json_output: options.Json = False,
) -> None:
    """Limit how fast storage nodes send to readers and read from their disks, for experiments. Without arguments, list
    the limits.

    Each node has the whole bandwidth, and all its connections share it. While its disk is limited, chunks on disk are
    not kept in memory. Limits are not stored: a node that restarts has none. Nodes accept limits only if they were
    started with `kvstore serve --experiments`.
    """
    from rich.filesize import decimal
    from rich.markup import escape
    from rich.table import Table

    from kvstore_cluster.disk_rate import require_disk_rate
    from kvstore_service.admin import ClusterAdmin
    from kvstore_service.bandwidth import format_bandwidth, parse_bandwidth
    from kvstore_service.listen import Address
    from kvstore_service.throttle import require_bandwidth

    if node is not None and bandwidth is None and disk is None:
        raise ConfigurationError(
            f"a limit for {node} needs a bandwidth, such as 50mbit, --disk 160MB/s, or off"
        )
    limit_bps = None if bandwidth in (None, _OFF) else parse_bandwidth(str(bandwidth))
    disk = _OFF if bandwidth == _OFF and disk is None else disk
    disk_limit = None if disk in (None, _OFF) else _parse_disk_speed(str(disk))
    require_bandwidth(limit_bps)
    require_disk_rate(disk_limit)
    with ClusterAdmin(str(Address.parse(address)), start="kvstore serve --experiments") as cluster:
        for chosen in cluster.nodes(node) if bandwidth or disk else ():
            if bandwidth is not None:
                chosen.throttle(limit_bps)
            if disk is not None:
                chosen.throttle_disk(disk_limit)
        nodes = [found for found in cluster.stats().nodes if found.alive]
    gauges = {found.member.node_id: found.stats.gauges for found in nodes}
    if json_output:
        rows = [
            {
                "node_id": name,
                "bandwidth_bps": found.get("throttle_bps"),
                "disk_read_Bps": found.get("disk_throttle_Bps"),
            }
            for name, found in gauges.items()
        ]
        typer.echo(json.dumps({"nodes": rows}, indent=2))
        return
    table = Table("node", "sending", "reading from disk", title=escape(f"limits at {address}"))
    for name, found in gauges.items():
        bps, disk_read = found.get("throttle_bps"), found.get("disk_throttle_Bps")
        table.add_row(
            escape(name),
            format_bandwidth(bps) if bps else "none",
            f"{decimal(disk_read)}/s" if disk_read else "none",
        )
    print_table(table)


def _parse_disk_speed(text: str) -> float:
    """Parses a disk rate such as `160MB/s` into bytes per second. Raises ConfigurationError."""
    from pydantic import ByteSize, TypeAdapter, ValidationError

    if text.replace(".", "", 1).isdecimal():
        raise ConfigurationError(f"{text!r} has no unit; write for example 160MB/s")
    try:
        return float(TypeAdapter(ByteSize).validate_python(text.removesuffix("/s")))
    except ValidationError as error:
        raise ConfigurationError(f"{text!r} is not a disk rate; write for example 160MB/s") from error
