"""`kvstore ls`."""

import json
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvstore_api.address import DEFAULT_ADDRESS
from kvstore_codec.errors import ConfigurationError
from kvstore_service.cli import options
from kvstore_service.cli.console import print_table

if TYPE_CHECKING:
    from kvstore_api.v1 import kvstore_pb2 as pb

_PAGE = 1024
_MOST = 1 << 30


def ls(
    node: Annotated[str | None, typer.Option(help="Only chunks on this node.")] = None,
    tenant: Annotated[
        str | None, typer.Option(help="Only chunks of this tenant; '' is the default tenant.")
    ] = None,
    prefix: Annotated[
        str, typer.Option(help="Only chunks whose content_id begins with these hex digits.")
    ] = "",
    limit: Annotated[int, typer.Option(min=0, max=_MOST, help="Lines to show; 0 shows all.")] = 100,
    address: options.Address = DEFAULT_ADDRESS,
    json_output: options.Json = False,
) -> None:
    """List the stored chunks, node by node."""
    from rich.filesize import decimal
    from rich.markup import escape
    from rich.table import Table

    from kvstore_service.admin import ClusterAdmin
    from kvstore_service.listen import Address

    begin = _hexadecimal(prefix)
    with ClusterAdmin(str(Address.parse(address))) as cluster:
        stored = (
            (found.node_id, variant)
            for found in cluster.nodes(node)
            for variant in found.variants(begin, tenant, min(_PAGE, limit + 1) if limit else _PAGE)
            if variant.chunk.content_id.hex().startswith(prefix.lower())
        )
        rows = [_row(node_id, variant) for node_id, variant in islice(stored, limit + 1 if limit else None)]
    more = bool(limit) and len(rows) > limit
    rows = rows[:limit] if limit else rows
    if json_output:
        typer.echo(json.dumps({"chunks": rows, "more": more}, indent=2))
        return
    table = Table(title=escape(f"chunks at {address}"))
    for column in ("chunk", "encoding", "size", "node", "tier", "tenant", "pinned", "ends in"):
        table.add_column(column, justify="right" if column in ("size", "ends in") else "left", no_wrap=True)
    for row in rows:
        table.add_row(
            f"{row['content_id'][:16]}+{row['prefix_id'][:16]}",
            escape(row["encoding"]),
            decimal(row["size_bytes"]),
            escape(row["node_id"]),
            "+".join(
                tier for tier, there in (("memory", row["in_memory"]), ("disk", row["on_disk"])) if there
            ),
            escape(row["tenant"]),
            "yes" if row["pinned"] else "",
            f"{row['ttl_left_s']} s" if row["ttl_left_s"] else "",
        )
    if more:
        table.caption = f"more than {limit}: --limit shows them"
    print_table(table)


def _row(node_id: str, variant: "pb.StoredVariant") -> dict[str, Any]:
    return {
        "node_id": node_id,
        "content_id": variant.chunk.content_id.hex(),
        "prefix_id": variant.chunk.prefix_id.hex(),
        "encoding": variant.encoding,
        "size_bytes": variant.size_bytes,
        "calibration": variant.calibration.hex(),
        "in_memory": variant.in_memory,
        "on_disk": variant.on_disk,
        "pinned": variant.pinned,
        "ttl_left_s": variant.ttl_left_s,
        "tenant": variant.tenant,
        "cost": variant.cost,
    }


def _hexadecimal(prefix: str) -> bytes:
    try:
        bytes.fromhex(prefix + "0" * (len(prefix) % 2))
    except ValueError as error:
        raise ConfigurationError(
            f"--prefix {prefix!r} is not the beginning of a content_id in hexadecimal digits"
        ) from error
    return bytes.fromhex(prefix[: len(prefix) // 2 * 2])
