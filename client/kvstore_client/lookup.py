"""Chunk lookup: which chunks of a prompt are stored, and on which nodes."""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace

import numpy as np

from kvstore_api.placement import Member
from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_client.cluster_view import ClusterView
from kvstore_client.match import Match, StoredChunk, Variant
from kvstore_client.metrics import ClientMetrics
from kvstore_client.miss_reason import MissReason
from kvstore_client.replicas import Lease, Search
from kvstore_client.settings import EXACT, ClientSettings, FetchPolicy
from kvstore_codec.chunk import ChunkHeader
from kvstore_codec.codec import chunk_geometry
from kvstore_codec.encoding import Encoding, Rate
from kvstore_codec.errors import CodecError, ForeignChunkError, NodeUnavailableError
from kvstore_codec.geometry import Geometry
from kvstore_codec.identity import CHUNK_TOKENS, ChunkId, PlacedChunk, PrefixId
from kvstore_codec.klt_frames import KLT
from kvstore_codec.model_spec import ModelSpec

NOT_STORED = "not stored"
"""`Match.why_not` where the nodes were asked, and have nothing."""

_RELEASE_TIMEOUT_S = 10.0  # a node under heavy load answers slowly, and no caller waits for this call
# No encoder makes a frame twice as large as its KV; a larger announced frame is refused.
_FRAME_OVERHEAD_BYTES = 64 << 10


def find_prefix(
    view: ClusterView,
    settings: ClientSettings,
    metrics: ClientMetrics,
    ready_klt: Callable[[bytes], KLT | None],
    spec: ModelSpec,
    chunk_ids: Sequence[ChunkId],
    chunk_tokens: int = CHUNK_TOKENS,
    *,
    peek: bool = False,
) -> Match:
    """Look up the longest run of stored chunks at the beginning of a text.

    All chunks are looked up at once. The nodes are told which chunks the run uses, and count only these as used; with
    `peek` nothing is counted or leased. Variants whose calibration `ready_klt` does not have yet are skipped.

    An owner that does not answer, or that answers with headers of other chunks, is treated as not having the chunk, and
    the reason is counted. Raises NodeUnavailableError when no owner answers.
    """
    first_tokens = range(0, len(chunk_ids) * chunk_tokens, chunk_tokens)
    lookup = _Lookup(
        view, settings, metrics, ready_klt, spec, chunk_ids, first_tokens, chunk_tokens, peek=peek
    )
    lookup.ask()
    run: list[StoredChunk] = []
    while (chunk := lookup.found.get(len(run))) is not None:
        run.append(chunk)
    return lookup.matched(range(len(run)))


def find_segments(
    view: ClusterView,
    settings: ClientSettings,
    metrics: ClientMetrics,
    ready_klt: Callable[[bytes], KLT | None],
    spec: ModelSpec,
    placed: Sequence[PlacedChunk],
    chunk_tokens: int = CHUNK_TOKENS,
    *,
    peek: bool = False,
) -> Match:
    """Look up all stored chunks of a segmented prompt, with gaps where nothing is stored. A chunk in the prompt's own
    context is preferred; otherwise one with the same tokens in another context is used. `placed` is ordered by
    position. Otherwise like `find_prefix`."""
    ids = [chunk.chunk_id for chunk in placed]
    first_tokens = [chunk.first_token for chunk in placed]
    lookup = _Lookup(
        view, settings, metrics, ready_klt, spec, ids, first_tokens, chunk_tokens, any_context=True, peek=peek
    )
    lookup.ask()
    return lookup.matched(sorted(lookup.found))


class _Lookup:
    """State of one prompt's lookup."""

    def __init__(
        self,
        view: ClusterView,
        settings: ClientSettings,
        metrics: ClientMetrics,
        ready_klt: Callable[[bytes], KLT | None],
        spec: ModelSpec,
        chunk_ids: Sequence[ChunkId],
        first_tokens: Sequence[int],
        chunk_tokens: int,
        *,
        any_context: bool = False,
        peek: bool = False,
    ) -> None:
        self._peek = peek
        self._view, self._settings, self._metrics = view, settings, metrics
        self._ready_klt = ready_klt
        self._spec, self._chunk_ids, self._chunk_tokens = spec, chunk_ids, chunk_tokens
        self._first_tokens, self._any_context = first_tokens, any_context
        # A floor accepts more encodings than a request can list, so nodes return every encoding they have.
        self._encodings = settings.encodings.accept if settings.encodings.floor is None else ()
        self._all_encodings = len(self._encodings) != 1
        self._plain = any(not Encoding.parse(name).needs_calibration for name in self._encodings or [EXACT])
        # Geometry and frame limit, by encoding name and calibration digest.
        self._known: dict[tuple[str, bytes, int | None], tuple[Geometry, int]] = {}
        self._ranks: dict[str, tuple[int, int, str] | None] = {}
        self.found: dict[int, StoredChunk] = {}
        self._leases: list[Lease] = []
        self.unready: set[int] = set()
        """Chunks that are stored only with a calibration that is not loaded yet."""
        self.why_not = NOT_STORED
        """Reason for an empty match."""

    def ask(self) -> None:
        """Look up all chunks. Raises NodeUnavailableError when no owner answers."""
        deadline_s, wanted = time.monotonic() + self._settings.timeouts.lookup_s, range(len(self._chunk_ids))
        failure: NodeUnavailableError | None = None
        try:
            self._search(wanted)
        except NodeUnavailableError as error:
            failure = error
        # All owners of a chunk may have failed and rejoined at other addresses: only the coordinator knows.
        missing = [index for index in wanted if index not in self.found and index not in self.unready]
        if missing and self._view.renew(deadline_s - time.monotonic()):
            try:
                self._search(missing, deadline_s - time.monotonic())
                failure = None
            except NodeUnavailableError as error:
                failure = failure and error
        if failure is not None:
            raise failure
        if self.unready:
            self._metrics.missed(MissReason.CALIBRATION_LOADING)
            self.why_not = "calibration_loading: stored, but the calibration is not loaded yet"

    def matched(self, usable: Sequence[int]) -> Match:
        """The match of the found chunks at these indices. Tells their nodes which chunks are used."""
        chunks = [self.found[index] for index in usable]
        holders = dict(zip(usable, (chunk.member for chunk in chunks), strict=True))
        leases = []
        for lease in self._leases:
            used = np.array([holders.get(index) == lease.member for index in lease.asked], np.bool_)
            bits = np.packbits(used, bitorder="little").tobytes()
            tokens = int(used.sum()) * self._chunk_tokens
            leases.append(lease._replace(used=bits, tokens=tokens))
        report_use(self._view, leases)
        kept = tuple(lease for lease in leases if lease.tokens)
        return Match(tuple(chunks), kept, None if chunks else self.why_not)

    def _search(self, wanted: Sequence[int], timeout_s: float = math.inf) -> None:
        search = Search(
            self._view,
            self._settings,
            self._chunk_ids,
            self._encodings,
            self._take,
            all_encodings=self._all_encodings,
            any_context=self._any_context,
            peek=self._peek,
        )
        try:
            search.run(wanted, timeout_s=timeout_s)
        finally:
            self._leases += search.leases
            if search.failures:
                why = search.failures[0]
                self.why_not = f"unreachable: {why}"
                self._metrics.missed(
                    MissReason.LOOKUP_FAILED, detail=f"{why}; its chunks are computed", cause=why
                )
        if not search.asked:
            self._metrics.missed(MissReason.PAUSED)
            self.why_not = f"paused: {search.why_paused}"

    def _take(self, index: int, member: Member, answer: pb.LookupAnswer) -> bool:
        """Record an answer. Returns whether it is usable and no other node needs to be asked for another variant."""
        asked = self._chunk_ids[index]
        chunk_id = asked
        if self._any_context and answer.prefix_id:
            if index in self.found:
                return True
            try:
                chunk_id = ChunkId(asked.content_id, PrefixId(answer.prefix_id))
            except CodecError as error:
                self._refuse(MissReason.BAD_HEADER, member, error)
                return False
        variants: list[Variant] = []
        unready = False
        offers: list[pb.LookupAnswer | pb.OtherEncoding] = [answer]
        if self._all_encodings:
            offers += answer.others
        for offer in offers:
            encoding = offer.encoding
            if self._rank(encoding) is None and self._settings.encodings.floor is not None:
                continue  # the node returned every encoding it has
            try:
                variant = self._variant(chunk_id, encoding, offer.header, on_disk=offer.on_disk)
            except CodecError as error:
                self._refuse(MissReason.of_header(error), member, error)
            else:
                if variant is None:
                    unready = True
                else:
                    variants.append(variant)
        if variants:
            if len(variants) > 1:
                variants.sort(key=lambda variant: self._ranks[variant.header.encoding.name])  # type: ignore[arg-type, return-value]
            first_token = self._first_tokens[index]
            self.found[index] = StoredChunk(
                chunk_id, tuple(variants), member, first_token, exact=chunk_id == asked
            )
            self.unready.discard(index)
            return True
        if unready:
            self.unready.add(index)
        return unready and not self._plain

    def _refuse(self, reason: MissReason, member: Member, error: CodecError) -> None:
        self.why_not = f"{reason}: {error}"
        self._metrics.missed(
            reason, detail=f"an answer of the storage node at {member.endpoint} cannot be used: {error}"
        )

    def _variant(self, chunk_id: ChunkId, encoding: str, data: bytes, *, on_disk: bool) -> Variant | None:
        """The variant described by a header; None when its calibration is not loaded yet. Raises CodecError for another
        chunk or an encoding that was not requested, CalibrationError for a calibration of another model, and
        SignatureError for a chunk that is not trusted."""
        header = self._view.signatures.read(data)
        header.require(model_digest=self._spec.digest, chunk_id=chunk_id)
        klt = None
        if header.calibration is not None:
            klt = self._ready_klt(header.calibration)
            if klt is None:
                return None
            klt.calibration.require(self._spec)
        self._require_expected(header, encoding, klt)
        return Variant(header, data[: header.header_bytes], klt, on_disk)

    def _rank(self, name: str) -> tuple[int, int, str] | None:
        """Sort key of an encoding among a chunk's variants; None for an encoding that may not be used."""
        if name not in self._ranks:
            accept = self._settings.encodings.accept
            rank = None
            if self._settings.encodings.accepts(name):
                rate = Encoding.parse(name).rate
                # The fidelity of an explicit quantisation step is unknown.
                faithful = rate.rank if isinstance(rate, Rate) else len(Rate)
                if (
                    self._settings.fetch.policy is FetchPolicy.FIXED
                    and self._settings.encodings.floor is None
                ):
                    faithful = 0  # the user's order
                rank = faithful, accept.index(name) if name in accept else len(accept), name
            self._ranks[name] = rank
        return self._ranks[name]

    def _require_expected(self, header: ChunkHeader, encoding: str, klt: KLT | None) -> None:
        """Raises ForeignChunkError if the encoding was not requested, or the shape is not that of this model's KV."""
        if self._rank(encoding) is None or header.encoding.name != encoding:
            raise ForeignChunkError(
                f"chunk {header.chunk_id.short} is offered as {encoding}, and its header says {header.encoding.name}"
            )
        geometry, frame_limit = self._expected(header, klt)
        if max(header.frame_lengths) > frame_limit:
            raise ForeignChunkError(
                f"chunk {header.chunk_id.short} is offered as {encoding} in frames of up to "
                f"{max(header.frame_lengths)} bytes"
            )
        if header.geometry != geometry:
            raise ForeignChunkError(
                f"chunk {header.chunk_id.short} is announced as {encoding} of {geometry}, "
                f"but its header says {header.geometry}"
            )

    def _expected(self, header: ChunkHeader, klt: KLT | None) -> tuple[Geometry, int]:
        """Geometry of this model's chunks, and the largest frame in bytes. Cached: all chunks of a prompt share it."""
        encoding, digest = header.encoding, klt.calibration.digest if klt is not None else b""
        # Where neither a name, a calibration nor a picture says the number of layers a period, the writer chose it.
        is_free = klt is None and not encoding.is_video and encoding.period_layers is None
        period_layers = header.geometry.period_layers if is_free else None
        known = self._known.get((encoding.name, digest, period_layers))
        if known is None:
            geometry = chunk_geometry(self._spec, self._chunk_tokens, encoding, klt)
            if period_layers is not None:
                geometry = replace(geometry, period_layers=period_layers)
            frame_limit = 2 * geometry.frame_values(0) * self._spec.dtype.itemsize + _FRAME_OVERHEAD_BYTES
            known = self._known[encoding.name, digest, period_layers] = geometry, frame_limit
        return known


def report_use(view: ClusterView, leases: Iterable[Lease]) -> None:
    """Tell nodes which of the looked up chunks are used, without waiting. The nodes end the leases on the others."""
    with suppress(NodeUnavailableError):  # the client was closed: the leases expire
        for lease in leases:
            request = pb.UseRequest(lease_id=lease.lease_id, used=lease.used, tokens=lease.tokens)
            call = view.storage(lease.member.endpoint).Use.future(request, timeout=_RELEASE_TIMEOUT_S)
            view.finish_later(call)


def release(view: ClusterView, leases: Iterable[Lease]) -> None:
    """Release leases without waiting. A lease whose release fails expires by itself."""
    with suppress(NodeUnavailableError):  # the client was closed: the leases expire
        for lease in leases:
            request = pb.ReleaseLeaseRequest(lease_id=lease.lease_id, used=lease.used, tokens=lease.tokens)
            call = view.storage(lease.member.endpoint).ReleaseLease.future(
                request, timeout=_RELEASE_TIMEOUT_S
            )
            view.finish_later(call)
