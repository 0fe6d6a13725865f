"""Audits a cluster after the faults: whether every acknowledged chunk is on all its owners with the right bytes."""

import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass

import grpc

from kvstore_api.placement import Member, Placement
from kvstore_bench.faults.copies import Copies
from kvstore_bench.faults.documents import ENCODING, SPEC, Document
from kvstore_bench.faults.testbed import REPLICAS
from kvstore_codec.codec import encode_chunk
from kvstore_codec.encoding import Encoding
from kvstore_codec.identity import ChunkId

_POLL_S = 0.5


@dataclass(frozen=True, slots=True)
class Audit:
    """Result of an audit, in chunks."""

    chunks: int
    lost: int
    """Acknowledged chunks that no node has."""
    under_replicated: int
    """Chunks that lacked an owner's copy when the time limit ended."""
    wrong_copies: int
    """Copies whose bytes differ from the stored ones."""
    repair_s: float | None
    """Seconds until every chunk was on all its owners; None if that was not reached."""


def audit(address: str, documents: Sequence[Document], patience_s: float) -> Audit:
    """Starts a round of repair, waits for it, and then reads every copy. Raises grpc.RpcError and TransferError."""
    ids = [chunk_id for document in documents for chunk_id in document.ids()]
    began_s = time.monotonic()
    with closing(Copies(address)) as copies:
        copies.repair()
        while True:
            members = copies.members()
            missing = _missing(copies, members, ids)
            if missing == 0 or time.monotonic() > began_s + patience_s:
                break
            time.sleep(_POLL_S)
        repair_s = time.monotonic() - began_s if missing == 0 else None
        held = {member: copies.held(member, ids) for member in members}
        lost = sum(not any(flags) for flags in zip(*held.values(), strict=True))
        wrong = sum(_wrong(copies, member, documents, flags) for member, flags in held.items())
    return Audit(len(ids), lost, missing, wrong, repair_s)


def _missing(copies: Copies, members: Sequence[Member], ids: Sequence[ChunkId]) -> int:
    """Number of chunks that one of their owners lacks. While a node does not answer, all chunks count."""
    owners = Placement(members, REPLICAS).owners([chunk_id.content_id for chunk_id in ids])
    complete = [len(owned) == REPLICAS for owned in owners]
    for member in members:
        owned = [index for index, row in enumerate(owners) if member in row]
        try:
            held = copies.held(member, [ids[index] for index in owned])
        except grpc.RpcError:
            return len(ids)
        for index, has in zip(owned, held, strict=True):
            complete[index] &= has
    return complete.count(False)


def _wrong(copies: Copies, member: Member, documents: Sequence[Document], held: Sequence[bool]) -> int:
    chunks = [(document, *chunk) for document in documents for chunk in enumerate(document.ids())]
    there = [chunk for chunk, has in zip(chunks, held, strict=True) if has]
    encoding = Encoding.parse(ENCODING)
    wrong = 0
    stored = copies.read(member, [chunk_id for _, _, chunk_id in there])
    for (document, index, chunk_id), found in zip(there, stored, strict=True):
        keys, values = document.kv(index)
        expected = encode_chunk(keys, values, spec=SPEC, chunk_id=chunk_id, encoding=encoding)
        wrong += found != b"".join(expected.parts)
    return wrong
