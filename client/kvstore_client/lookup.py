"""Longest-prefix lookup: which leading chunks of a prompt are stored, and where."""

from collections.abc import Sequence
from dataclasses import dataclass

import grpc

from kvstore_api.placement import Member
from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_client.cluster_view import ClusterView
from kvstore_client.metrics import ClientMetrics
from kvstore_client.settings import ClientSettings
from kvstore_codec.chunk import ChunkHeader, read_header
from kvstore_codec.encoding import Encoding
from kvstore_codec.errors import CodecError, ForeignChunkError, NodeUnavailableError
from kvstore_codec.geometry import Geometry
from kvstore_codec.identity import CHUNK_TOKENS, ChunkId
from kvstore_codec.model_spec import ModelSpec

_RELEASE_TIMEOUT_S = 1.0
# No encoder makes a frame twice as large as its KV; one that claims to be is not waited for.
_FRAME_OVERHEAD_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class StoredChunk:
    """A chunk of the prompt that is stored: what its header says, and who holds it."""

    chunk_id: ChunkId
    header: ChunkHeader
    member: Member
    first_token: int
    """Position in the prompt of the chunk's first token."""


@dataclass(frozen=True, slots=True)
class PrefixMatch:
    """The longest run of stored chunks at the beginning of a prompt, leased until released."""

    chunks: tuple[StoredChunk, ...] = ()
    leases: tuple[tuple[Member, bytes], ...] = ()

    @property
    def tokens(self) -> int:
        return sum(chunk.header.geometry.tokens for chunk in self.chunks)


def find_prefix(
    view: ClusterView,
    settings: ClientSettings,
    metrics: ClientMetrics,
    spec: ModelSpec,
    chunk_ids: Sequence[ChunkId],
    chunk_tokens: int = CHUNK_TOKENS,
) -> PrefixMatch:
    """Ask each owner once for all its chunks, then keep the run that starts at the first.

    Raises NodeUnavailableError when no owner answered. An owner that does not answer, or answers with a header that
    is not this chunk's, ends the run: its chunks count as not stored, and the reason is counted.
    """
    geometry = Geometry.of(spec, chunk_tokens)
    by_member: dict[Member, list[int]] = {}
    for index, chunk_id in enumerate(chunk_ids):
        owner = view.owner(chunk_id.content_id)
        if not view.is_paused(owner.endpoint):
            by_member.setdefault(owner, []).append(index)
    if not by_member:
        metrics.missed("paused")
        return PrefixMatch()

    calls = {
        member: view.storage(member.endpoint).Lookup.future(
            pb.LookupRequest(
                chunks=[_ref(chunk_ids[index]) for index in indices],
                lease_ms=round(settings.lease_s * 1000),
                with_headers=True,
                encodings=settings.accept,
            ),
            timeout=settings.lookup_timeout_s,
        )
        for member, indices in by_member.items()
    }
    found: dict[int, StoredChunk] = {}
    leases: list[tuple[Member, bytes]] = []
    failures: list[grpc.RpcError] = []
    for member, call in calls.items():
        try:
            reply = call.result()
        except grpc.RpcError as error:
            failures.append(error)
            view.pause(member.endpoint)
            continue
        if reply.lease_id:
            leases.append((member, reply.lease_id))
        for index, answer in zip(by_member[member], reply.answers, strict=False):
            if not answer.encoding:
                continue
            try:
                header = _trusted_header(answer, settings.accept, spec, geometry, chunk_ids[index])
            except CodecError:
                metrics.missed("bad_header")
                continue
            found[index] = StoredChunk(chunk_ids[index], header, member, index * chunk_tokens)
    if failures:
        metrics.missed("lookup_failed")
        view.refresh()
        if len(failures) == len(calls):
            raise NodeUnavailableError(
                f"no owner answered a lookup: {failures[0].code().name}"
            ) from failures[0]

    run: list[StoredChunk] = []
    while (chunk := found.get(len(run))) is not None:
        run.append(chunk)
    return PrefixMatch(tuple(run), tuple(leases))


def release(view: ClusterView, match: PrefixMatch) -> None:
    """Give the leases back, without waiting; a lease that cannot be given back expires by itself."""
    for member, lease_id in match.leases:
        request = pb.ReleaseLeaseRequest(lease_id=lease_id)
        view.finish_later(
            view.storage(member.endpoint).ReleaseLease.future(request, timeout=_RELEASE_TIMEOUT_S)
        )


def _ref(chunk_id: ChunkId) -> pb.ChunkRef:
    return pb.ChunkRef(content_id=chunk_id.content_id, prefix_id=chunk_id.prefix_id)


def _trusted_header(
    answer: pb.LookupAnswer,
    accept: Sequence[str],
    spec: ModelSpec,
    geometry: Geometry,
    chunk_id: ChunkId,
) -> ChunkHeader:
    """The header of an answer. Raises CodecError if it is broken, of another chunk, in an encoding that was not asked
    for, or unlike this model's KV."""
    header = read_header(answer.header)
    header.require(model_digest=spec.digest, chunk_id=chunk_id)
    frame_limit = 2 * geometry.frame_values(0) * spec.dtype.itemsize + _FRAME_OVERHEAD_BYTES
    if answer.encoding not in accept or max(header.frame_lengths) > frame_limit:
        raise ForeignChunkError(
            f"chunk {chunk_id.short} is offered as {answer.encoding} in frames of up to "
            f"{max(header.frame_lengths)} bytes"
        )
    if header.encoding != Encoding.parse(answer.encoding) or header.geometry != geometry:
        raise ForeignChunkError(
            f"chunk {chunk_id.short} is announced as {answer.encoding} of {geometry}, "
            f"but its header says {header.encoding.name} of {header.geometry}"
        )
    return header
