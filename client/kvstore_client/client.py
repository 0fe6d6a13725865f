"""The client: match a prompt, fetch what matches, store what does not."""

import atexit
import logging
import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

from pydantic import ValidationError

from kvstore_client.buffers import BufferPool
from kvstore_client.calibrations import Calibrations
from kvstore_client.canaries import Canaries
from kvstore_client.cluster_view import ClusterView
from kvstore_client.fetch import ChunkFeatures, Computing, Destination, Fetch
from kvstore_client.fetch.restore import Restorer
from kvstore_client.fork import GATE, renew_in_children
from kvstore_client.grpc_failure import unreachable
from kvstore_client.lookup import find_prefix, find_segments, release
from kvstore_client.match import Match
from kvstore_client.metrics import ClientMetrics
from kvstore_client.miss_reason import MissReason
from kvstore_client.pages import PageNamespace, PageStore
from kvstore_client.planning import AdaptivePlanner, FixedPlanner, KVFetcherPlanner, Links, Planner
from kvstore_client.ready_calibrations import Loading, ReadyCalibrations
from kvstore_client.settings import ClientSettings, FetchPolicy, flat_name
from kvstore_client.store import Store
from kvstore_client.timeline import Timeline
from kvstore_codec.encoding import Encoding, Rate
from kvstore_codec.errors import ConfigurationError, NodeUnavailableError
from kvstore_codec.identity import (
    CHUNK_TOKENS,
    ChunkId,
    PlacedChunk,
    chunk_ids,
    naming_digest,
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


def connect(address: str | None = None, **settings: Any) -> "KVStoreClient":
    """A client of the cluster whose coordinator listens on `address` (`host:port`).

    Nothing is contacted yet, and a service that is away is no error: prompts are then prefilled. `settings` go by their
    flat names, such as `lookup_timeout_s` (docs/settings.md); what is not given comes from `KVSTORE_*` environment
    variables. Raises ConfigurationError that names the setting that does not exist or cannot have its value.
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
        # The original would print what was given, and that may be the tenant's salt.
        raise ConfigurationError(f"cannot use these client settings: {problems}") from None


class KVStoreClient:
    """Engine-neutral access to the cluster. Thread-safe. Nothing here raises because the service misbehaves."""

    def __init__(self, settings: ClientSettings, restorer: type[Restorer] = Restorer) -> None:
        """A benchmark passes its own `restorer` to measure another order of the stages."""
        self.settings = settings
        self._restorer = restorer
        self.links = Links()
        """How fast each node's bytes came lately."""
        self._page_stores: list[PageStore] = []
        self._open()
        renew_in_children(self, KVStoreClient._renew)

    def _open(self) -> None:
        """Make all parts that have locks, threads or sockets. Threads and sockets come when they are first needed."""
        settings = self.settings
        self.metrics = ClientMetrics()
        self.buffers = BufferPool(settings.fetch.pool_bytes)
        self._view = ClusterView(settings, self.metrics, self.links.keep)
        self.calibrations = Calibrations(self._view, settings, self.metrics)
        """What is known about models' KV, by digest."""
        self.ready_calibrations = ReadyCalibrations(self.calibrations, settings, self.metrics)
        self.store = Store(self._view, self.ready_calibrations, settings, self.metrics)
        """Where new chunks are handed in."""
        self.canaries = Canaries(self._view, settings)
        """Whether a model computes here what the cluster's KV of it was computed with."""
        self._lock = threading.Lock()
        self._closed = False
        self._why_closed = "closed: the client was closed"

    def _renew(self) -> None:
        """In a forked child: everything anew, and all that is the parent's left to the parent. Calibrations that are
        ready stay; they are only read."""
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
                "A process was forked while gRPC calls of its cache client were under way, so that gRPC cannot be used "
                "in the child: nothing is reused or stored there. Make the client after the fork."
            )
        if GATE.calls_at_fork or was_closed:
            self.close()

    @property
    def is_closed(self) -> bool:
        """Whether it neither reads nor stores any more."""
        return self._closed

    def chunk_ids(self, spec: ModelSpec, token_ids: Sequence[int]) -> list[ChunkId]:
        """The ids of a text's full chunks, for this client's tenant."""
        return chunk_ids(self._naming(spec), self._salt, token_ids, CHUNK_TOKENS)

    def segment_chunks(
        self, spec: ModelSpec, token_ids: Sequence[int], segments: Sequence[int]
    ) -> list[PlacedChunk]:
        """The full chunks of a prompt made of neighbouring parts (system prefix, documents, question) of `segments`
        tokens, for this client's tenant. Each part is cut from its own start, so that a document is found again
        wherever it stands. Raises InvalidTokensError unless the lengths sum to the tokens."""
        return segment_chunks(self._naming(spec), self._salt, token_ids, segments, CHUNK_TOKENS)

    def prepare(self, spec: ModelSpec) -> Loading:
        """Start getting what will be needed for this model's KV, so that not the first prompt finds it missing: its
        newest calibration, if any accepted encoding needs one. Nobody has to wait for the future."""
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
        """The longest stored prefix of a text, leased. Empty when there is none or the service cannot be asked.
        A `peek` only looks: nothing is leased, and nowhere does it count as use.

        Takes at most `lookup_timeout_s` for each of membership and lookup; a node that failed is left alone for
        `retry_after_s`, and longer each time it fails again. Hand the match to `fetch`, or to `release`.
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
        """All chunks of a prompt in segments that are stored, as `segment_chunks` named them, in order of position and
        with gaps: exact ones, and in place of those that are not stored in their own context approximate ones, which
        are of the same content in another. Otherwise as `match`."""
        return self._matched(find_segments, spec, placed, timeline, peek=peek)

    def match_from_bytes(self, spec: ModelSpec, data: bytes) -> Match:
        """A match of this model that another process found and passed on with `Match.to_bytes`, to be fetched or
        released here. Calibrations are this client's own: one that is not ready yet is loaded meanwhile, and a chunk
        that can only be decoded with it is missing from a fetch that starts before that (`calibration_loading`).
        Waits for nothing.

        Raises MatchFormatError for bytes that are no match of this model."""
        return Match.from_bytes(data, spec, self.ready_calibrations.klt)

    def release(self, match: Match) -> None:
        """Give back a match that will not be fetched. Has no effect on leases that have ended."""
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
    ) -> Fetch:
        """Start bringing a match into `destination`, such as KVBuffers, whose positions begin at the prompt's first
        token.

        Chunks coded with a calibration are predicted from their tokens: `features(index)` returns the `token_features`
        of the match's chunk `index`, f32 `[tokens, features]` in host memory, made without the tokens before it. It is
        called at most once for each such chunk, in a thread of the fetch. Without it these chunks are missing.

        With the engine's `computing` the fetch is planned as the setting `fetch_policy` says, and may leave chunks to
        the engine (`Fetch.next_to_compute`) where that is sooner; without, every chunk is read in its first variant.

        `computed` are ranges of positions whose KV the engine computes itself (not together with `computing`): frames
        that lie wholly inside are not read, and what is there in the destination stays as it is; they count as
        delivered.

        Take KVBuffers from `self.buffers`, and give them back after the fetch has finished and nobody reads them.
        """
        return Fetch(
            match,
            destination,
            rotary,
            features,
            view=self._view,
            links=self.links,
            settings=self.settings,
            metrics=self.metrics,
            timeline=timeline or Timeline(),
            planner=_PLANNERS[self.settings.fetch.policy](),
            computing=computing,
            computed=computed,
            restorer=self._restorer,
        )

    def pages(self, namespace: PageNamespace, **options: Any) -> PageStore:
        """Where an engine that has keys and pages of its own reads and stores them; `options` are those of PageStore.
        Its names also depend on the setting `tenant_salt`. Closed with the client."""
        pages = PageStore(namespace, self.settings, lambda: (self._view, self.metrics), **options)
        with self._lock:
            self._page_stores = [*(store for store in self._page_stores if not store.is_closed), pages]
        return pages

    def close(self) -> None:
        """Finish storing what was handed in, then disconnect."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        for pages in self._page_stores:
            pages.close()
        self.store.close()
        self.ready_calibrations.close()
        self._view.close()

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
        try:
            with (timeline or Timeline()).span("lookup"):
                ready_klt = self.ready_calibrations.klt
                match = find(self._view, self.settings, self.metrics, ready_klt, spec, chunks, peek=peek)
        except NodeUnavailableError as error:
            self._unreachable(error)
            return Match(why_not=f"unreachable: {error}")
        if not peek:
            exact = sum(chunk.exact for chunk in match.chunks)
            self.metrics.matched(exact=exact, approximate=len(match.chunks) - exact, tokens=match.tokens)
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
