"""`kvstore evict`."""

import json
from collections import defaultdict
from typing import TYPE_CHECKING, Annotated

import typer

from kvstore_api.address import DEFAULT_ADDRESS
from kvstore_codec.errors import ConfigurationError
from kvstore_service.cli import options

if TYPE_CHECKING:
    from kvstore_codec.identity import ChunkId
    from kvstore_service.admin import NodeAdmin
    from kvstore_service.admin.cluster import ChunksByTenant


def evict(
    chunks: options.Chunks = None,
    from_file: options.ChunkFile = None,
    tenant: Annotated[
        str | None,
        typer.Option(help="All chunks of this tenant, or the named ones; '' is the default tenant."),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="All chunks.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask for confirmation.")] = False,
    address: options.Address = DEFAULT_ADDRESS,
    json_output: options.Json = False,
) -> None:
    """Remove chunks from all nodes, in every encoding, including pinned ones."""
    from kvstore_service.admin import ClusterAdmin
    from kvstore_service.cli.chunk_arguments import chunk_patterns
    from kvstore_service.listen import Address

    patterns = chunk_patterns(chunks, from_file)
    if bool(patterns) + (tenant is not None and not patterns) + everything != 1:
        raise ConfigurationError("name what to evict by one of: chunks, --tenant, --all")
    deleted: dict[str, int] = {}
    with ClusterAdmin(str(Address.parse(address))) as cluster:
        nodes = cluster.nodes()
        if patterns:
            chosen = cluster.find(patterns, tenant)
            stored = {node.node_id: chosen for node in nodes}
        else:
            stored = {node.node_id: _stored(node, tenant) for node in nodes}
        named = {(owner, chunk) for found in stored.values() for owner in found for chunk in found[owner]}
        if named and not yes:
            typer.confirm(f"Remove {len(named)} chunks from {len(nodes)} nodes?", abort=True, err=True)
        for node in nodes:
            deleted[node.node_id] = sum(
                node.delete(found, owner) for owner, found in stored[node.node_id].items()
            )
    if json_output:
        typer.echo(json.dumps({"chunks": len(named), "deleted": deleted}, indent=2))
    else:
        where = ", ".join(f"{count} on {node_id}" for node_id, count in deleted.items())
        typer.echo(f"evicted {len(named)} chunks; stored variants removed: {where}")


def _stored(node: "NodeAdmin", tenant: str | None) -> "ChunksByTenant":
    from kvstore_service.wire import chunk_id

    found: defaultdict[str, dict[ChunkId, None]] = defaultdict(dict)
    for variant in node.variants(tenant=tenant):
        found[variant.tenant][chunk_id(variant.chunk)] = None
    return {owner: list(chunks) for owner, chunks in found.items()}
