"""`kvstore pin` and `kvstore unpin`."""

import json
from typing import TYPE_CHECKING

import typer

from kvstore_api.address import DEFAULT_ADDRESS
from kvstore_service.cli import options
from kvstore_service.cli.console import print_table

if TYPE_CHECKING:
    from kvstore_codec.identity import ChunkId


def pin(
    chunks: options.Chunks = None,
    from_file: options.ChunkFile = None,
    tenant: options.Tenant = None,
    address: options.Address = DEFAULT_ADDRESS,
    json_output: options.Json = False,
) -> None:
    """Protect chunks from eviction, on all nodes, now and later. Without chunks, list the pinned chunks."""
    from kvstore_service.admin import ClusterAdmin
    from kvstore_service.cli.chunk_arguments import chunk_patterns
    from kvstore_service.listen import Address

    patterns = chunk_patterns(chunks, from_file)
    with ClusterAdmin(str(Address.parse(address))) as cluster:
        if not patterns:
            _show_pins(address, cluster.pins(tenant or ""), json_output=json_output)
            return
        chosen = cluster.find(patterns, tenant)
        pins = cluster.pin(chosen)
    names = [chunk for named in chosen.values() for chunk in named]
    _report("pinned", names, pins, json_output=json_output)


def unpin(
    chunks: options.Chunks = None,
    from_file: options.ChunkFile = None,
    tenant: options.Tenant = None,
    address: options.Address = DEFAULT_ADDRESS,
    json_output: options.Json = False,
) -> None:
    """Allow the eviction of pinned chunks again."""
    from kvstore_codec.errors import ConfigurationError
    from kvstore_service.admin import ClusterAdmin
    from kvstore_service.admin.chunk_names import unique
    from kvstore_service.cli.chunk_arguments import chunk_patterns
    from kvstore_service.listen import Address

    patterns = chunk_patterns(chunks, from_file)
    if not patterns:
        raise ConfigurationError("no chunks were given; `kvstore pin` lists the pinned chunks")
    with ClusterAdmin(str(Address.parse(address))) as cluster:
        pinned = cluster.pins(tenant or "")
        chosen = list(unique(chunk for pattern in patterns for chunk in pattern.choose(pinned)))
        pins = cluster.unpin({tenant or "": chosen})
    _report("unpinned", chosen, pins, json_output=json_output)


def _report(what: str, chunks: "list[ChunkId]", pins: int, *, json_output: bool) -> None:
    if json_output:
        typer.echo(json.dumps({what: _names(chunks), "pins": pins}, indent=2))
    else:
        typer.echo(f"{what} {len(chunks)} {'chunk' if len(chunks) == 1 else 'chunks'}; {pins} are pinned now")


def _show_pins(address: str, pins: "list[ChunkId]", *, json_output: bool) -> None:
    from rich.markup import escape
    from rich.table import Table

    if json_output:
        typer.echo(json.dumps({"pinned": _names(pins), "pins": len(pins)}, indent=2))
        return
    table = Table("content_id", "prefix_id", title=escape(f"pinned at {address}"))
    for chunk in pins:
        table.add_row(chunk.content_id.hex()[:32], chunk.prefix_id.hex()[:32])
    print_table(table)


def _names(chunks: "list[ChunkId]") -> list[str]:
    from kvstore_service.admin.chunk_names import name

    return [name(chunk) for chunk in chunks]
