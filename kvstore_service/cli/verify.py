"""`kvstore verify`."""

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvstore_api.address import DEFAULT_ADDRESS
from kvstore_service.cli import options
from kvstore_service.cli.console import notices, print_table

if TYPE_CHECKING:
    from kvstore_api.v1 import kvstore_pb2 as pb
    from kvstore_service.admin import ClusterAdmin


def verify(
    node: Annotated[str | None, typer.Option(help="Only chunks on this node.")] = None,
    address: options.Address = DEFAULT_ADDRESS,
    json_output: options.Json = False,
) -> None:
    """Read all stored chunks and verify every checksum. Damaged chunks are removed, and the exit status is then 1."""
    from rich.filesize import decimal
    from rich.markup import escape
    from rich.table import Table

    from kvstore_service.admin import ClusterAdmin
    from kvstore_service.cli.stages import Stages
    from kvstore_service.listen import Address

    checked: dict[str, tuple[int, int]] = {}
    damaged: list[dict[str, Any]] = []
    with ClusterAdmin(str(Address.parse(address))) as cluster:
        nodes = cluster.nodes(node)
        chunks = _counts(cluster)
        with Stages(notices(), {found.node_id: found.node_id for found in nodes}) as stages:
            for found in nodes:
                for reply in found.verify():
                    checked[found.node_id] = (reply.checked, reply.bytes)
                    damaged += [_row(found.node_id, variant) for variant in reply.damaged]
                    total = reply.checked if reply.done else max(chunks.get(found.node_id, 0), reply.checked)
                    stages.advance(found.node_id, reply.checked, total)
    if json_output:
        rows = [{"node_id": name, "checked": count, "bytes": size} for name, (count, size) in checked.items()]
        typer.echo(json.dumps({"nodes": rows, "damaged": damaged}, indent=2))
    else:
        if damaged:
            table = Table(
                "chunk", "encoding", "node", "reason", title="damaged (removed) or unreadable (kept)"
            )
            for row in damaged:
                name = f"{row['content_id'][:16]}+{row['prefix_id'][:16]}"
                table.add_row(name, *(escape(row[column]) for column in ("encoding", "node_id", "reason")))
            print_table(table)
        count = sum(count for count, _ in checked.values())
        size = decimal(sum(size for _, size in checked.values()))
        typer.echo(f"{count} chunks ({size}) on {len(checked)} nodes checked, {len(damaged)} damaged")
    if damaged:
        raise typer.Exit(1)


def _counts(cluster: "ClusterAdmin") -> dict[str, int]:
    """Number of chunks on each node. Empty for a credential of one tenant, which may not ask for it."""
    from kvstore_codec.errors import ServiceError

    try:
        return {status.member.node_id: status.stats.chunks for status in cluster.stats().nodes}
    except ServiceError:
        return {}


def _row(node_id: str, damaged: "pb.DamagedVariant") -> dict[str, Any]:
    return {
        "node_id": node_id,
        "content_id": damaged.variant.chunk.content_id.hex(),
        "prefix_id": damaged.variant.chunk.prefix_id.hex(),
        "encoding": damaged.variant.encoding,
        "size_bytes": damaged.variant.size_bytes,
        "reason": damaged.reason,
    }
