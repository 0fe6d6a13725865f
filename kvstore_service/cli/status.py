"""`kvstore status`."""

import json
from typing import TYPE_CHECKING, Any

import typer

from kvstore_api.address import DEFAULT_ADDRESS
from kvstore_service.cli import options
from kvstore_service.cli.console import print_table

if TYPE_CHECKING:
    from rich.table import Table

    from kvstore_api.v1 import kvstore_pb2 as pb

_COLUMNS = (
    "node", "state", "chunks", "memory", "disk", "pinned", "hits", "misses", "evicted", "in", "out", "limit", "repair",
)  # fmt: skip
_RARE = ("disk", "pinned", "evicted", "limit", "repair")
_TEXT_COLUMNS = ("node", "state", "repair")


def status(address: options.Address = DEFAULT_ADDRESS, json_output: options.Json = False) -> None:
    """Show nodes, chunks, bytes in memory and on disk, hits and repair of a running cluster."""
    from kvstore_service.cluster_stats import background_works, cluster_stats
    from kvstore_service.listen import Address

    parsed = str(Address.parse(address))
    reply, well = cluster_stats(parsed), background_works(parsed)
    if json_output:
        rows = [_row(node) for node in reply.nodes]
        typer.echo(json.dumps({"epoch": reply.epoch, "background_works": well, "nodes": rows}, indent=2))
    else:
        print_table(_table(address, reply, background_works=well))


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
        "disk_chunks_by_key": _chunks_by_key(node),
    }


def _chunks_by_key(node: "pb.NodeStatus") -> dict[str, int]:
    """Chunks on disk by the key that encrypts them. Empty for a node without encryption."""
    samples = (sample for sample in node.stats.samples if sample.name == "disk_chunks_by_key")
    return dict(sorted((sample.labels[0], sample.value) for sample in samples))


def _table(address: str, reply: "pb.ClusterStatsReply", *, background_works: bool) -> "Table":
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    rows = [_cells(node) for node in reply.nodes]
    notes = [] if background_works else ["coordinator: a background loop fails; its log says why"]
    if dropped := reply.events.get("dropped", 0) + reply.events.get("unpublished", 0):
        notes.append(f"KV events: {dropped} could not be published; routers resynchronise")
    for node in reply.nodes:
        name = escape(node.member.node_id)
        if not node.alive or node.error:
            notes.append(f"{name} at {node.member.endpoint}: {escape(node.error)}")
        elif node.stats.disk_error:
            notes.append(f"{name}, disk: {escape(node.stats.disk_error)}")
        elif unreadable := node.stats.gauges.get("disk_unreadable"):
            notes.append(f"{name}, disk: {unreadable} chunks could not be read; check that disk")
        if by_key := _chunks_by_key(node):
            counts = ", ".join(f"{count} {key}" for key, count in by_key.items())
            notes.append(f"{name}, disk, chunks by key: {escape(counts)}")
        if failing := node.stats.gauges.get("background_failing", 0):
            notes.append(f"{name}: {failing} background loops fail; its log says why")
    table = Table(
        title=escape(f"cluster at {address}, epoch {reply.epoch}"),
        caption="\n".join(notes) or None,
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    # Columns that are empty for all nodes are left out: a table of all columns would not fit a terminal.
    shown = [name for name in _COLUMNS if name not in _RARE or any(row.get(name) for row in rows)]
    for name in shown:
        table.add_column(name, justify="left" if name in _TEXT_COLUMNS else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(row.get(name, "") for name in shown))
    return table


def _cells(node: "pb.NodeStatus") -> dict[str, str]:
    from rich.filesize import decimal
    from rich.markup import escape

    name, stats = escape(node.member.node_id), node.stats
    if not node.alive or node.error:
        return {"node": name, "state": "[red]down[/red]"}
    counters, gauges = stats.counters, stats.gauges
    return {
        "node": name,
        "state": "[yellow]draining[/yellow]" if node.member.draining else "up",
        "chunks": str(stats.chunks),
        "memory": _filled(stats.bytes_used, stats.bytes_limit),
        "disk": _filled(gauges.get("disk_bytes_used", 0), gauges.get("disk_bytes_limit", 0)),
        "pinned": str(gauges.get("pinned", 0) or ""),
        "hits": str(counters.get("hits", 0)),
        "misses": str(counters.get("misses", 0)),
        "evicted": str(counters.get("evictions", 0) or ""),
        "in": decimal(counters.get("bytes_in", 0)),
        "out": decimal(counters.get("bytes_out", 0)),
        "limit": _limits(gauges),
        "repair": _repair(node.member, gauges),
    }


def _filled(used_bytes: int, limit_bytes: int) -> str:
    from rich.filesize import decimal

    return (
        f"{100 * used_bytes / limit_bytes:.0f}% of {decimal(limit_bytes, precision=0)}" if limit_bytes else ""
    )


def _limits(gauges: Any) -> str:
    from rich.filesize import decimal

    from kvstore_service.bandwidth import format_bandwidth

    limits = []
    if "throttle_bps" in gauges:
        limits.append(format_bandwidth(gauges["throttle_bps"]))
    if "disk_throttle_Bps" in gauges:
        limits.append(f"disk {decimal(gauges['disk_throttle_Bps'], precision=0)}/s")
    return ", ".join(limits)


def _repair(member: "pb.Member", gauges: Any) -> str:
    if member.draining:
        return f"{gauges.get('drain_left', 0)} to give" if gauges.get("draining") else "begins to drain"
    if gauges.get("repair_running"):
        return f"{gauges.get('repair_checked', 0)} of {gauges.get('repair_total', 0)}"
    left = gauges.get("repair_left", 0)
    return f"{left} not everywhere" if left else ""
