"""Longest-prefix lookup: which leading chunks of a prompt are stored, and where."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import grpc

from kvstore_api.placement import Member
from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_client.cluster_view import ClusterView
from kvstore_client.metrics import ClientMetrics
from kvstore_client.settings import ClientSettings
from kvstore_codec.chunk import ChunkHeader, read_header
from kvstore_codec.codec import chunk_geometry
from kvstore_codec.encoding import Encoding
from kvstore_codec.errors import CalibrationError, CodecError, ForeignChunkError, NodeUnavailableError
from kvstore_codec.identity import CHUNK_TOKENS, ChunkId
from kvstore_codec.klt_frames import KLT
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
    klt: KLT | None = None
    """The calibration its header names, if it names one."""


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
    ready_klt: Callable[[bytes], KLT | None],
    spec: ModelSpec,
    chunk_ids: Sequence[ChunkId],
    chunk_tokens: int = CHUNK_TOKENS,
) -> PrefixMatch:
    """Ask each owner once for all its chunks, then keep the run that starts at the first.

    A chunk whose calibration `ready_klt` does not have yet is asked for once more in the accepted encodings that need
    none. Raises NodeUnavailableError when no owner answered. An owner that does not answer, or answers with a header
    that is not this chunk's, ends the run: its chunks count as not stored, and the reason is counted.
    """
    lookup = _Lookup(view, settings, metrics, ready_klt, spec, chunk_ids, chunk_tokens)
    lookup.ask(range(len(chunk_ids)), settings.accept)
    plain = [name for name in settings.accept if not Encoding.parse(name).needs_calibration]
    if lookup.unready and plain:
        waiting, lookup.unready = lookup.unready, []
        try:
            lookup.ask(waiting, plain)
        except NodeUnavailableError:
            metrics.missed("unreachable")
        lookup.unready = [index for index in waiting if index not in lookup.found]
    if lookup.unready:
        metrics.missed("calibration_loading")
    run: list[StoredChunk] = []
    while (chunk := lookup.found.get(len(run))) is not None:
        run.append(chunk)
    return PrefixMatch(tuple(run), tuple(lookup.leases))


class _Lookup:
    """What the owners of a prompt's chunks have answered so far."""

    def __init__(
        self,
        view: ClusterView,
        settings: ClientSettings,
        metrics: ClientMetrics,
        ready_klt: Callable[[bytes], KLT | None],
        spec: ModelSpec,
        chunk_ids: Sequence[ChunkId],
        chunk_tokens: int,
    ) -> None:
        self._view, self._settings, self._metrics = view, settings, metrics
        self._ready_klt = ready_klt
        self._spec, self._chunk_ids, self._chunk_tokens = spec, chunk_ids, chunk_tokens
        self.found: dict[int, StoredChunk] = {}
        self.leases: list[tuple[Member, bytes]] = []
        self.unready: list[int] = []
        """Chunks that are stored, but their calibration is not at hand."""

    def ask(self, indices: Iterable[int], accept: Sequence[str]) -> None:
        """Raises NodeUnavailableError when no owner answered."""
        by_member: dict[Member, list[int]] = {}
        for index in indices:
            owner = self._view.owner(self._chunk_ids[index].content_id)
            if not self._view.is_paused(owner.endpoint):
                by_member.setdefault(owner, []).append(index)
        if not by_member:
            self._metrics.missed("paused")
            return
        calls = {
            member: self._view.storage(member.endpoint).Lookup.future(
                pb.LookupRequest(
                    chunks=[_ref(self._chunk_ids[index]) for index in owned],
                    lease_ms=round(self._settings.lease_s * 1000),
                    with_headers=True,
                    encodings=accept,
                ),
                timeout=self._settings.lookup_timeout_s,
            )
            for member, owned in by_member.items()
        }
        failures: list[grpc.RpcError] = []
        for member, call in calls.items():
            try:
                reply = call.result()
            except grpc.RpcError as error:
                failures.append(error)
                self._view.pause(member.endpoint)
                continue
            if reply.lease_id:
                self.leases.append((member, reply.lease_id))
            for index, answer in zip(by_member[member], reply.answers, strict=False):
                if answer.encoding:
                    self._take(index, member, answer, accept)
        if failures:
            self._metrics.missed("lookup_failed")
            self._view.refresh()
            if len(failures) == len(calls):
                raise NodeUnavailableError(
                    f"no owner answered a lookup: {failures[0].code().name}"
                ) from failures[0]

    def _take(self, index: int, member: Member, answer: pb.LookupAnswer, accept: Sequence[str]) -> None:
        chunk_id = self._chunk_ids[index]
        try:
            header = read_header(answer.header)
            header.require(model_digest=self._spec.digest, chunk_id=chunk_id)
            klt = None
            if header.calibration is not None:
                klt = self._ready_klt(header.calibration)
                if klt is None:
                    self.unready.append(index)
                    return
                klt.calibration.require(self._spec)
            _require_expected(header, answer, accept, self._spec, klt, self._chunk_tokens)
        except CalibrationError:
            self._metrics.missed("calibration_foreign")
        except CodecError:
            self._metrics.missed("bad_header")
        else:
            self.found[index] = StoredChunk(chunk_id, header, member, index * self._chunk_tokens, klt)


def release(view: ClusterView, match: PrefixMatch) -> None:
    """Give the leases back, without waiting; a lease that cannot be given back expires by itself."""
    for member, lease_id in match.leases:
        request = pb.ReleaseLeaseRequest(lease_id=lease_id)
        view.finish_later(
            view.storage(member.endpoint).ReleaseLease.future(request, timeout=_RELEASE_TIMEOUT_S)
        )


def _ref(chunk_id: ChunkId) -> pb.ChunkRef:
    return pb.ChunkRef(content_id=chunk_id.content_id, prefix_id=chunk_id.prefix_id)


def _require_expected(
    header: ChunkHeader,
    answer: pb.LookupAnswer,
    accept: Sequence[str],
    spec: ModelSpec,
    klt: KLT | None,
    chunk_tokens: int,
) -> None:
    """Raises ForeignChunkError if the chunk is in an encoding that was not asked for, or unlike this model's KV."""
    encoding = header.encoding
    geometry = chunk_geometry(spec, chunk_tokens, encoding, klt)
    frame_limit = 2 * geometry.frame_values(0) * spec.dtype.itemsize + _FRAME_OVERHEAD_BYTES
    if answer.encoding not in accept or max(header.frame_lengths) > frame_limit:
        raise ForeignChunkError(
            f"chunk {header.chunk_id.short} is offered as {answer.encoding} in frames of up to "
            f"{max(header.frame_lengths)} bytes"
        )
    if encoding.name != answer.encoding or header.geometry != geometry:
        raise ForeignChunkError(
            f"chunk {header.chunk_id.short} is announced as {answer.encoding} of {geometry}, "
            f"but its header says {encoding.name} of {header.geometry}"
        )
