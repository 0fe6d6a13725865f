"""`kvstore status`."""

import json
from typing import TYPE_CHECKING, Any

import typer

from kvstore_api.address import DEFAULT_ADDRESS
from kvstore_service.cli import options

if TYPE_CHECKING:
    from rich.table import Table

    from kvstore_api.v1 import kvstore_pb2 as pb

_TEXT_COLUMNS = ("node", "state", "repair")


def status(address: options.Address = DEFAULT_ADDRESS, json_output: options.Json = False) -> None:
    """Show nodes, chunks, bytes in memory and on disk, hits and repair of a running cluster."""
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
        "bulk_endpoint": node.member.bulk_endpoint,
        "domain": node.member.domain,
        "weight": node.member.weight,
        "alive": node.alive,
        "draining": node.member.draining,
        "error": node.error,
        "disk_error": stats.disk_error,
        "chunks": stats.chunks,
        "bytes_used": stats.bytes_used,
        "bytes_limit": stats.bytes_limit,
        "leases": stats.leases,
        "gauges": dict(sorted(stats.gauges.items())),
        "counters": dict(sorted(stats.counters.items())),
    }


def _table(address: str, reply: "pb.ClusterStatsReply") -> "Table":
    from rich.filesize import decimal
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"cluster at {address}, epoch {reply.epoch}")
    columns = ("chunks", "memory", "disk", "pinned", "hits", "misses", "evicted", "in", "out", "repair")
    for column in ("node", "state", *columns):
        table.add_column(column, justify="left" if column in _TEXT_COLUMNS else "right", no_wrap=True)
    notes: list[str] = []
    for node in reply.nodes:
        name = node.member.node_id
        if not node.alive or node.error:
            notes.append(f"{name} at {node.member.endpoint}: {escape(node.error)}")
            table.add_row(name, "[red]down[/red]")
            continue
        stats, counters, gauges = node.stats, node.stats.counters, node.stats.gauges
        if stats.disk_error:
            notes.append(f"{name} does without its disk: {escape(stats.disk_error)}")
        table.add_row(
            name,
            "[yellow]draining[/yellow]" if node.member.draining else "up",
            str(stats.chunks),
            _filled(stats.bytes_used, stats.bytes_limit),
            _filled(gauges.get("disk_bytes_used", 0), gauges.get("disk_bytes_limit", 0)),
            str(gauges.get("pinned", 0)),
            *(str(counters.get(count, 0)) for count in ("hits", "misses", "evictions")),
            *(decimal(counters.get(count, 0)) for count in ("bytes_in", "bytes_out")),
            _repair(node.member, gauges),
        )
    if notes:
        table.caption = "\n".join(notes)
    return table


def _filled(used_bytes: int, limit_bytes: int) -> str:
    from rich.filesize import decimal

    return f"{100 * used_bytes / limit_bytes:.0f} % of {decimal(limit_bytes)}" if limit_bytes else ""


def _repair(member: "pb.Member", gauges: Any) -> str:
    if member.draining:
        return f"{gauges.get('drain_left', 0)} to give" if gauges.get("draining") else "begins to drain"
    if gauges.get("repair_running"):
        return f"{gauges.get('repair_checked', 0)} of {gauges.get('repair_total', 0)}"
    left = gauges.get("repair_left", 0)
    return f"{left} not everywhere" if left else ""
