"""`kvstore status`."""

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvstore_api.address import DEFAULT_ADDRESS

if TYPE_CHECKING:
    from rich.table import Table

    from kvstore_api.v1 import kvstore_pb2 as pb


def status(
    address: Annotated[
        str, typer.Option(envvar="KVSTORE_ADDRESS", help="host:port of the coordinator.")
    ] = DEFAULT_ADDRESS,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show nodes, chunks, bytes and hit counters of a running cluster."""
    from rich.console import Console

    from kvstore_service.cluster_stats import cluster_stats
    from kvstore_service.listen import Address

    reply = cluster_stats(str(Address.parse(address)))
    if json_output:
        typer.echo(
            json.dumps({"epoch": reply.epoch, "nodes": [_row(node) for node in reply.nodes]}, indent=2)
        )
    else:
        Console().print(_table(address, reply))


def _row(node: "pb.NodeStatus") -> dict[str, Any]:
    stats = node.stats
    return {
        "node_id": node.member.node_id,
        "endpoint": node.member.endpoint,
        "alive": node.alive,
        "error": node.error,
        "chunks": stats.chunks,
        "bytes_used": stats.bytes_used,
        "bytes_limit": stats.bytes_limit,
        "leases": stats.leases,
        "counters": dict(sorted(stats.counters.items())),
    }


def _table(address: str, reply: "pb.ClusterStatsReply") -> "Table":
    from rich.filesize import decimal
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"cluster at {address}, epoch {reply.epoch}")
    for column in ("node", "state", "chunks", "memory", "hits", "misses", "in", "out"):
        table.add_column(column, justify="left" if column in ("node", "state") else "right", no_wrap=True)
    down: list[str] = []
    for node in reply.nodes:
        stats, counters = node.stats, node.stats.counters
        up = node.alive and not node.error
        if not up:
            down.append(f"{node.member.node_id} at {node.member.endpoint}: {escape(node.error)}")
        table.add_row(
            node.member.node_id,
            "up" if up else "[red]down[/red]",
            str(stats.chunks),
            f"{100 * stats.bytes_used / stats.bytes_limit:.0f} % of {decimal(stats.bytes_limit)}"
            if up
            else "",
            *(str(counters[name]) for name in ("hits", "misses")),
            *(decimal(counters[name]) for name in ("bytes_in", "bytes_out")),
        )
    if down:
        table.caption = "\n".join(down)
    return table
