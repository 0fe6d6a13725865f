"""The cache client: look up a prompt's stored KV, fetch it, and store newly computed KV."""

import atexit
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from pydantic import ValidationError

from kvstore_client.buffers import BufferPool
from kvstore_client.calibrations import Calibrations
from kvstore_client.canaries import Canaries
from kvstore_client.cluster_view import ClusterView
from kvstore_client.contiguous.cache import FrameCache
from kvstore_client.contiguous.summary_store import SummaryStore
from kvstore_client.fetch import ChunkFeatures, Computing, Destination, Fetch, FetchReports, ReadTask
from kvstore_client.fetch.restore import Restorer
from kvstore_client.fork import GATE, renew_in_children
from kvstore_client.frames import FrameRead
from kvstore_client.frames.reader import FrameReader
from kvstore_client.grpc_failure import unreachable
from kvstore_client.logs import install_once
from kvstore_client.lookup import find_prefix, find_segments, release
from kvstore_client.match import Match
from kvstore_client.metrics import ClientMetrics
from kvstore_client.miss_reason import MissReason
from kvstore_client.pages import PageNamespace, PageStore
from kvstore_client.planning import (
    AdaptivePlanner,
    FixedPlanner,
    KVFetcherPlanner,
    LeadingPlanner,
    Links,
    Planner,
)
from kvstore_client.ready_calibrations import Loading, ReadyCalibrations
from kvstore_client.request_trace import RequestTracing, frames_traceparent, looking_up
from kvstore_client.scores import ScoreReports
from kvstore_client.settings import ClientSettings, FetchPolicy, flat_name
from kvstore_client.store import Store
from kvstore_client.timeline import Timeline
from kvstore_codec.encoding import Encoding, Rate
from kvstore_codec.errors import ConfigurationError, NodeUnavailableError
from kvstore_codec.identity import (
    CHUNK_TOKENS,
    ChunkId,
    PlacedChunk,
    PrefixId,
    chunk_ids,
    content_id,
    naming_digest,
    prefix_id,
    qualified_salt,
    segment_chunks,
)
from kvstore_codec.model_spec import ModelSpec
from kvstore_codec.rope import RotaryTable

log = logging.getLogger(__name__)

_PLANNERS: dict[FetchPolicy, Callable[[], Planner]] = {
    FetchPolicy.ADAPTIVE: AdaptivePlanner,
    FetchPolicy.KVFETCHER: KVFetcherPlanner,
    FetchPolicy.FIXED: FixedPlanner,
}
_WAITING_PLANNERS: dict[FetchPolicy, Callable[[], Planner]] = {
    FetchPolicy.ADAPTIVE: LeadingPlanner,
    FetchPolicy.KVFETCHER: lambda: KVFetcherPlanner("front"),
    FetchPolicy.FIXED: lambda: FixedPlanner("front"),
}
"""For engines that compute nothing until the fetch has ended (`Computing.waits`)."""


def connect(address: str | None = None, **settings: Any) -> "KVStoreClient":
    """Create a client of the cluster whose coordinator listens on `address` (`host:port`).

    The call makes no connection, and an unreachable service is not an error: prompts are then prefilled. `settings` are
    given by their flat names, such as `lookup_timeout_s` (docs/settings.md); all others come from `KVSTORE_*`
    environment variables. Raises ConfigurationError, which names the unknown or invalid setting.
    """
    if address is not None:
        settings["address"] = address
    if "durability" in settings:
        log.warning("the client setting durability is called put_durability now")
        settings["put_durability"] = settings.pop("durability")
    try:
        return KVStoreClient(ClientSettings(**settings))
    except ValidationError as error:
        problems = "; ".join(f"{flat_name(e['loc'])}: {e['msg']}" for e in error.errors())
        # Pydantic's own error prints the given values, and one of them may be the tenant's salt.
        raise ConfigurationError(f"cannot use these client settings: {problems}") from None


class KVStoreClient:
    """Engine-neutral access to the cluster. Thread-safe. A misbehaving service never makes a method raise."""

    def __init__(self, settings: ClientSettings, restorer: type[Restorer] = Restorer) -> None:
        """`restorer` restores fetched chunks; benchmarks pass another one to measure a different order of stages."""
        self.settings = settings
        install_once(settings.log_format, settings.log_level)
        self._restorer = restorer
        self.links = Links()
        """Recent throughput of each node's endpoint."""
        self._page_stores: list[PageStore] = []
        self._open()
        renew_in_children(self, KVStoreClient._renew)

    def _open(self) -> None:
        """Create every part that owns locks, threads or sockets. Threads and sockets start on first use."""
        settings = self.settings
        self.metrics = ClientMetrics(self.links)
        self.tracing = RequestTracing(settings.tracing)
        """Makes the timelines of requests, and exports their traces."""
        self.buffers = BufferPool(settings.fetch.pool_bytes)
        self._view = ClusterView(settings, self.metrics, self.links.keep)
        self._frames = FrameReader(self._view, settings, self.metrics, self.links)
        self._scores = ScoreReports(self._view, settings.store.tenant)
        self._fetch_reports = FetchReports(self._view)
        self.calibrations = Calibrations(self._view, settings, self.metrics)
        """Calibrations of KV codecs, by digest."""
        self.ready_calibrations = ReadyCalibrations(self.calibrations, settings, self.metrics)
        self.store = Store(self._view, self.ready_calibrations, settings, self.metrics, self.links)
        """Encodes and sends new chunks in the background."""
        self.frame_cache = FrameCache(settings.reprefill.cache_bytes, settings.reprefill.device_cache_bytes)
        """Frames that questions with a budget have read."""
        self.summaries = SummaryStore(self.pages, settings.timeouts.lookup_s)
        """Key summaries, against which questions with a budget are scored."""
        self.canaries = Canaries(self._view, settings)
        """Compares the KV of local models with the canaries of the cluster."""
        self._lock = threading.Lock()
        self._closed = False
        self._why_closed = "closed: the client was closed"

    def _renew(self) -> None:
        """Recreate all parts in a forked child and leave the parent's threads and connections alone. Loaded
        calibrations are read-only and stay."""
        parents, ready, was_closed = self._view, self.ready_calibrations, self._closed
        for part in (self.store, ready):
            atexit.unregister(part.close)
        parents.leave_to_parent()
        self._open()
        self.ready_calibrations.inherit(ready)
        if GATE.calls_at_fork and not was_closed:
            self._why_closed = (
                "forked: gRPC calls were under way in the parent, so this process cannot use the client"
            )
            log.warning(
                "A process was forked while gRPC calls of its cache client were under way, so gRPC cannot be used "
                "in the child: it neither reuses nor stores KV. Create the client after the fork."
            )
        if GATE.calls_at_fork or was_closed:
            self.close()

    @property
    def is_closed(self) -> bool:
        """Whether the client no longer reads or stores."""
        return self._closed

    def chunk_ids(self, spec: ModelSpec, token_ids: Sequence[int]) -> list[ChunkId]:
        """Ids of the full chunks of `token_ids`, for this client's tenant."""
        return chunk_ids(self._naming(spec), self._salt, token_ids, CHUNK_TOKENS)

    def next_chunk_id(
        self, spec: ModelSpec, parent: PrefixId, token_ids: Sequence[int], qualifier: bytes = b""
    ) -> ChunkId:
        """The id of the chunk of these tokens behind the text that `parent` names, for this client's tenant: for texts
        that grow, and where KV depends on more than model and tokens, which `qualifier` then names. With an empty
        qualifier the ids are those of `chunk_ids`."""
        content = content_id(self._naming(spec), qualified_salt(self._salt, qualifier), token_ids)
        return ChunkId(content, prefix_id(parent, content))

    def segment_chunks(
        self, spec: ModelSpec, token_ids: Sequence[int], segments: Sequence[int]
    ) -> list[PlacedChunk]:
        """Full chunks of a prompt that consists of consecutive segments (system prefix, documents, question) with the
        lengths `segments`, for this client's tenant. Each segment is chunked from its own start, so a document is found
        at any position. Raises InvalidTokensError unless the lengths sum to the number of tokens."""
        return segment_chunks(self._naming(spec), self._salt, token_ids, segments, CHUNK_TOKENS)

    def prepare(self, spec: ModelSpec) -> Loading:
        """Preload what this model's KV needs, so that the first prompt finds it ready: the newest calibration, if any
        accepted encoding needs one. Returns a future; waiting for it is optional."""
        encodings = self.settings.encodings
        lossy = encodings.floor not in (None, Rate.EXACT)
        if lossy or any(Encoding.parse(n).needs_calibration for n in (*encodings.stored, *encodings.accept)):
            return self.ready_calibrations.for_model(spec.digest)
        nothing: Loading = Loading()
        nothing.set_result(None)
        return nothing

    def match(
        self,
        spec: ModelSpec,
        ids: Sequence[ChunkId],
        timeline: Timeline | None = None,
        *,
        peek: bool = False,
    ) -> Match:
        """Look up and lease the longest stored prefix of a text. The match is empty when nothing is stored or the
        service cannot be asked. With `peek` the lookup takes no lease and does not count as a use.

        Membership and lookup take at most `lookup_timeout_s` each. A failed node is skipped for `retry_after_s`, twice
        as long after each further failure. Pass the match to `fetch` or to `release`.
        """
        return self._matched(find_prefix, spec, ids, timeline, peek=peek)

    def match_segments(
        self,
        spec: ModelSpec,
        placed: Sequence[PlacedChunk],
        timeline: Timeline | None = None,
        *,
        peek: bool = False,
    ) -> Match:
        """Look up and lease all stored chunks of a segmented prompt (`segment_chunks`), ordered by position, with gaps.

        An exact chunk was computed in the prompt's own context. Where none is stored, an approximate chunk is used: the
        same tokens, computed in another context. Otherwise like `match`.
        """
        return self._matched(find_segments, spec, placed, timeline, peek=peek)

    def match_from_bytes(self, spec: ModelSpec, data: bytes) -> Match:
        """Read a match of this model that another process found and serialised with `Match.to_bytes`, to fetch or
        release it here. Does not block.

        This client uses its own calibrations. A calibration that is not loaded yet starts to load; a fetch that begins
        earlier misses the chunks that need it (`calibration_loading`). Raises MatchFormatError for bytes that are not a
        match of this model.
        """
        return Match.from_bytes(data, spec, self.ready_calibrations.klt, self._view.signatures.read)

    def release(self, match: Match) -> None:
        """Release the leases of a match that will not be fetched. Leases that have ended are ignored."""
        release(self._view, match.leases)

    def fetch(
        self,
        match: Match,
        destination: Destination,
        rotary: tuple[RotaryTable, ...] | None,
        timeline: Timeline | None = None,
        features: ChunkFeatures | None = None,
        computing: Computing | None = None,
        computed: Sequence[range] = (),
        windows: Sequence[int | None] = (),
    ) -> Fetch:
        """Start fetching a match into `destination`, such as KVBuffers, whose positions begin at the prompt's first
        token.

        Chunks that are coded with a calibration are predicted from their tokens: `features(index)` returns the
        `token_features` of the match's chunk `index`, f32 `[tokens, features]` in host memory, computed without the
        preceding tokens. It is called at most once per such chunk, in a thread of the fetch. Without `features` these
        chunks are missing.

        With the engine's `computing`, the fetch is planned by the setting `fetch_policy` and may leave chunks to the
        engine (`Fetch.next_to_compute`) where computing is faster. An engine that computes nothing meanwhile
        (`Computing.waits`) polls `Fetch.finished`: the fetch reads leading chunks, and ends when the engine had better
        compute. Without `computing`, every chunk is read in its first variant.

        `computed` are ranges of positions whose KV the engine computes itself (not together with `computing`). Frames
        inside these ranges are not read, the destination keeps its content there, and they count as delivered.

        `windows` are the sliding windows of the layers (`ModelSpec.sliding_windows`), for a match without gaps. In
        layers with a window, KV that no computed token attends to is not read, and the destination keeps its content
        there: an engine that computes from position p on finds the `window - 1` tokens before p, and must not look
        further back.

        Acquire KVBuffers from `self.buffers`, and release them after the fetch has finished and nothing reads them.
        """
        own = self.tracing.timeline() if timeline is None else None
        planners = _WAITING_PLANNERS if computing is not None and computing.waits else _PLANNERS
        return Fetch(
            match,
            destination,
            rotary,
            features,
            view=self._view,
            links=self.links,
            settings=self.settings,
            metrics=self.metrics,
            timeline=own or timeline or Timeline(),
            planner=planners[self.settings.fetch.policy](),
            computing=computing,
            computed=computed,
            windows=windows,
            restorer=self._restorer,
            on_finish=None if own is None else lambda: self.tracing.export(own, "kvstore.fetch", {}),
            fetch_reports=self._fetch_reports,
        )

    def read_frames(
        self,
        tasks: Sequence[ReadTask],
        *,
        timeout_s: float | None = None,
        buffers: Sequence[memoryview] | None = None,
        timeline: Timeline | None = None,
    ) -> FrameRead:
        """Start reading ranges of single frames (`fetch.cut.cut_period`), such as those that a question needs of one
        period, and return at once. Each node that holds some of the chunks gets one request. The ranges should be in
        order of importance: nodes begin with the first ones. Their spans belong to the trace of `timeline`.

        Every range completes within `timeout_s` (default: `fetch_timeout_s`), delivered or missing. `buffers` are one
        writable, contiguous view per range, of at least its `size_bytes`, and receive the bytes in place; a range's
        buffer may be reused once its result was taken. Without `buffers` the results refer to memory that is reused
        when nothing refers to it any more. Reading takes no lease, so keep the leases of the match until the end.
        """
        timeout_s = self.settings.timeouts.fetch_s if timeout_s is None else timeout_s
        return self._frames.start(tasks, timeout_s, buffers, frames_traceparent(timeline))

    def report(self, scores: Mapping[ChunkId, float]) -> bool:
        """Report how much attention a model paid to chunks after a re-prefill: each chunk's share, 0 to 1. Nodes that
        evict by value keep chunks with more attention longer. Does not wait. Counts at most 4,096 chunks, those with
        the highest scores, and only chunks that this client's `tenant` stored. Returns whether the report was sent: it
        is dropped while many earlier ones wait for their answers, and when no node can be reached."""
        if not scores or self._closed:
            return False
        try:
            return self._scores.send(scores)
        except NodeUnavailableError as error:
            self._unreachable(error)
            return False

    def pages(self, namespace: PageNamespace, **options: Any) -> PageStore:
        """Open a store of pages for an engine that has its own page keys and layout; `options` are those of PageStore.
        The stored names also depend on the setting `tenant_salt`. The client closes the store when it is closed."""
        pages = PageStore(namespace, self.settings, lambda: (self._view, self.metrics), **options)
        with self._lock:
            self._page_stores = [*(store for store in self._page_stores if not store.is_closed), pages]
            closed = self._closed
        if closed:  # `close` did not see it
            pages.close()
        return pages

    def close(self) -> None:
        """Finish storing the chunks in the queue, then disconnect."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        for pages in self._page_stores:
            pages.close()
        self._frames.close()
        self.store.close()
        self.ready_calibrations.close()
        self._view.close()
        self.tracing.close()

    def _naming(self, spec: ModelSpec) -> bytes:
        return naming_digest(spec.digest, self.canaries.generation(spec.digest))

    @property
    def _salt(self) -> bytes:
        return self.settings.tenant_salt.get_secret_value().encode()

    def _matched(
        self,
        find: Callable[..., Match],
        spec: ModelSpec,
        chunks: Sequence[object],
        timeline: Timeline | None,
        *,
        peek: bool,
    ) -> Match:
        if not chunks:
            return Match(why_not=f"too_short: no part of the prompt fills a chunk of {CHUNK_TOKENS} tokens")
        if self._closed:
            self.metrics.missed(MissReason.CLOSED)
            return Match(why_not=self._why_closed)
        if not peek:
            self.metrics.requested(len(chunks) * CHUNK_TOKENS)
        try:
            with looking_up(timeline or Timeline()):
                ready_klt = self.ready_calibrations.klt
                match = find(self._view, self.settings, self.metrics, ready_klt, spec, chunks, peek=peek)
        except NodeUnavailableError as error:
            self._unreachable(error)
            # Asks in the background also while the coordinator is paused, so that the pause ends when it is back.
            self._view.refresh()
            return Match(why_not=f"unreachable: {error}")
        if not peek:
            exact = sum(chunk.exact for chunk in match.chunks)
            self.metrics.matched(exact=exact, approximate=len(match.chunks) - exact, tokens=match.tokens)
        log.debug("a lookup found %d of %d chunks", len(match.chunks), len(chunks))
        return match

    def _unreachable(self, error: NodeUnavailableError) -> None:
        self.metrics.missed(
            MissReason.UNREACHABLE, detail=unreachable(error, self.settings.address), cause=str(error)
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
