"""The text format of a ClusterState: JSON with a format name, a version and a checksum.

Version 2 added pins, quotas, draining nodes and the repair round. A version 1 document is read as having none.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import xxhash

from kvstore_api.placement import Member
from kvstore_cluster.catalogue.base import ClusterState, NodeRecord
from kvstore_cluster.forgotten import Forgotten
from kvstore_cluster.json_values import as_text, as_truth, as_whole
from kvstore_codec import bounded
from kvstore_codec.errors import CatalogueError, CodecError
from kvstore_codec.identity import ChunkId, ContentId, PrefixId

_NAME, _VERSION = "kvstore-catalogue", 2
_READABLE = (1, 2)
_ID_BYTES = 32
MAX_DOCUMENT_BYTES = 64 << 20
"""Three times the size of a document with the most pins allowed."""
_MOST_VALUES = 1 << 20
"""Above the number of pins, of tenants with quotas, and of forgotten tenants together."""
_MAX_REASON = 200


def write_document(state: ClusterState) -> str:
    content = {
        "epoch": state.epoch,
        "nodes": [asdict(node) for node in state.nodes],
        "pins": _pins(state.pins.get("", ())),
        "quotas": state.quotas,
        "draining": sorted(state.draining),
        "repair_round": state.repair_round,
        "changes": state.changes,
    }
    # Earlier releases read this document, too, and ignore the pins of other tenants and forgotten tenants.
    if tenants := {tenant: _pins(pins) for tenant, pins in state.pins.items() if tenant}:
        content["tenant_pins"] = tenants
    if state.forgotten.newest:
        content["forgotten"] = dict(state.forgotten.tenants)
        content["forgotten_floor"] = state.forgotten.floor
    document = {"format": _NAME, "version": _VERSION, "state": content, "checksum": _checksum(content)}
    return json.dumps(document, indent=1)


def read_document(text: str, name: str) -> ClusterState:
    """Parses a document. `name` is its origin, for errors. Raises CatalogueError for any text that is not sound."""
    if len(text) > MAX_DOCUMENT_BYTES:
        raise unsound(name, f"it has {len(text)} characters, but at most {MAX_DOCUMENT_BYTES} are allowed")
    try:
        document = bounded.loads(text, _MOST_VALUES)
        kind, version = as_text(document["format"]), as_whole(document["version"])
        sound = document["checksum"] == _checksum(document["state"])
        readable = kind == _NAME and version in _READABLE
        state = _parse(document["state"], version) if sound and readable else ClusterState()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, CodecError) as error:
        raise unsound(name, repr(error)) from error
    if not sound:
        raise unsound(name, "its checksum does not match")
    if not readable:
        versions = " and ".join(map(str, _READABLE))
        raise CatalogueError(
            f"{name} is {_short(kind)} version {_short(version)}; this release reads {_NAME} versions {versions}"
        )
    return state


def unsound(name: str, reason: str) -> CatalogueError:
    return CatalogueError(
        f"the catalogue {name} is damaged ({_short(reason)}); restore it from a copy, or move it away to start a new "
        "cluster"
    )


def _short(value: object) -> str:
    return str(value)[:_MAX_REASON]


def _checksum(content: dict[str, Any]) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(content, sort_keys=True).encode())


def _parse(content: dict[str, Any], version: int) -> ClusterState:
    nodes = tuple(
        NodeRecord(
            _member(node["member"]),
            as_whole(node["incarnation"]),
            as_truth(node["alive"]),
            as_text(node["error"]),
        )
        for node in content["nodes"]
    )
    if version == 1:
        return ClusterState(as_whole(content["epoch"]), nodes)
    return ClusterState(
        as_whole(content["epoch"]),
        nodes,
        pins={
            as_text(tenant): chunks
            for tenant, pins in ({"": content["pins"]} | content.get("tenant_pins", {})).items()
            if (chunks := frozenset(map(_chunk_id, pins)))
        },
        quotas={as_text(tenant): as_whole(limit_bytes) for tenant, limit_bytes in content["quotas"].items()},
        draining=frozenset(map(as_text, content["draining"])),
        repair_round=as_whole(content["repair_round"]),
        changes=as_whole(content["changes"]),
        forgotten=Forgotten(
            {as_text(tenant): as_whole(last) for tenant, last in content.get("forgotten", {}).items()},
            as_whole(content.get("forgotten_floor", 0)),
        ),
    )


def _member(fields: dict[str, Any]) -> Member:
    weight = fields.get("weight", 1.0)
    member = Member(**fields | {"weight": weight if type(weight) is float else as_whole(weight)})
    for text in (member.node_id, member.endpoint, member.bulk_endpoint, member.domain):
        as_text(text)
    as_truth(member.draining)
    return member


def _pins(pins: Iterable[ChunkId]) -> list[str]:
    return sorted((chunk.content_id + chunk.prefix_id).hex() for chunk in pins)


def _chunk_id(pin: str) -> ChunkId:
    ids = bytes.fromhex(pin)
    return ChunkId(ContentId(ids[:_ID_BYTES]), PrefixId(ids[_ID_BYTES:]))
