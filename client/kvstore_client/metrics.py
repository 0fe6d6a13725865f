"""Counters of KV reuse, and of reasons against it: for Prometheus, and readable in the process."""

import threading
from collections import Counter as Counts
from collections import deque
from collections.abc import Mapping

from prometheus_client import REGISTRY
from prometheus_client.registry import Collector

from kvstore_client import metric_table as table
from kvstore_client.bandwidth_metric import BandwidthCollector
from kvstore_client.contiguous.report import ReprefillReport
from kvstore_client.failure_log import FailureLog
from kvstore_client.fork import REGISTRY_LOCK
from kvstore_client.miss_reason import MissReason
from kvstore_client.planning.links import Links
from kvstore_client.spans import STAGES
from kvstore_client.timeline import Timeline
from kvstore_codec.encoding import Encoding

_CHUNKS = table.CHUNKS.counter()
_MATCHED = table.MATCHED.counter()
_MATCHED_TOKENS = table.MATCHED_TOKENS.counter()
_REQUESTED_TOKENS = table.REQUESTED_TOKENS.counter()
_MISSES = table.MISSES.counter()
_BYTES = table.BYTES.counter()
_FETCHED_BYTES = table.FETCHED_BYTES.counter()
_STORED_BYTES = table.STORED_BYTES.counter()
_UNDER_REPLICATED = table.UNDER_REPLICATED.counter()
_FAILOVERS = table.FAILOVERS.counter()
_GUARDED = table.GUARDED.counter()
_TOKENS = table.TOKENS.counter()
_FETCH_S = table.FETCH_S.histogram()
_PREDICTED_S = table.PREDICTED_S.histogram()
_PREDICTION_RATIO = table.PREDICTION_RATIO.histogram()
_STAGE_S = table.STAGE_S.histogram()
_REPLANS = table.REPLANS.counter()
_PLANNED = table.PLANNED.counter()
_PAGES = table.PAGES.counter()
_FRAMES = table.FRAMES.counter()
_WAITING = table.WAITING.gauge()
_BANDWIDTH = BandwidthCollector()

_MOST_PREDICTIONS = 1024
"""Predictions that are kept until somebody takes them."""

_UNREGISTERED: list[Collector] = [
    _CHUNKS, _MATCHED, _MATCHED_TOKENS, _REQUESTED_TOKENS, _MISSES, _BYTES, _FETCHED_BYTES, _STORED_BYTES,
    _UNDER_REPLICATED, _FAILOVERS, _GUARDED, _TOKENS, _FETCH_S, _PREDICTED_S, _PREDICTION_RATIO, _STAGE_S, _REPLANS,
    _PLANNED, _PAGES, _FRAMES, _WAITING, _BANDWIDTH,
]  # fmt: skip


def _register() -> None:
    """Show the metrics in Prometheus. A process without a client does not show them, because another process may be the
    one that counts, as in an engine's API server."""
    with REGISTRY_LOCK:
        while _UNREGISTERED:
            REGISTRY.register(_UNREGISTERED.pop())


class ClientMetrics:
    """Counters of one client; every count also goes to the process-wide Prometheus registry. Thread-safe."""

    def __init__(self, links: Links | None = None) -> None:
        """The bandwidths that `links` estimate are exported for as long as they exist."""
        self._lock = threading.Lock()
        self._counts: Counts[str] = Counts()
        self._changes = 0
        self._predicted_s: deque[float] = deque(maxlen=_MOST_PREDICTIONS)
        self.failures = FailureLog()
        _register()
        if links is not None:
            with REGISTRY_LOCK:
                _BANDWIDTH.watch(links)

    def requested(self, tokens: int) -> None:
        """Count tokens of a prompt that was looked up."""
        with REGISTRY_LOCK:
            _REQUESTED_TOKENS.inc(tokens)
        self._add("tokens_requested", tokens)

    def matched(self, *, exact: int, approximate: int, tokens: int) -> None:
        """Count chunks that a lookup found and the prompt can use, exact and approximate."""
        with REGISTRY_LOCK:
            _MATCHED.labels("exact").inc(exact)
            _MATCHED.labels("approximate").inc(approximate)
            _MATCHED_TOKENS.inc(tokens)
        self._add("tokens_matched", tokens)
        self._add("chunks_matched_exact", exact)
        self._add("chunks_matched_approximate", approximate)

    def delivered(self, chunks: int) -> None:
        with REGISTRY_LOCK:
            _CHUNKS.labels("delivered").inc(chunks)
        self._add("chunks_delivered", chunks)

    def missed(
        self,
        reason: MissReason,
        chunks: int = 0,
        *,
        events: int = 1,
        detail: str | None = None,
        cause: str | None = None,
        error: Exception | None = None,
    ) -> None:
        """Count `events` of not reusing for `reason`, which cost `chunks` matched chunks. They count as missing, except
        those of a fetch that was cancelled.

        For a failure `detail` says what happened and what to do; it is logged once a minute per `cause` (default: the
        reason), with the traceback of `error` if the cause is a bug in this package. Without `detail` the event is
        normal operation.
        """
        if detail is not None:
            self.failures.warn(reason if cause is None else cause, detail, error)
        result = "cancelled" if reason is MissReason.CANCELLED else "missing"
        with REGISTRY_LOCK:
            _MISSES.labels(reason).inc(events)
            _CHUNKS.labels(result).inc(chunks)
        self._add(f"miss_{reason}", events)
        self._add(f"chunks_{result}", chunks)

    def received(self, size_bytes: int) -> None:
        with REGISTRY_LOCK:
            _BYTES.labels("in").inc(size_bytes)
        self._add("bytes_in", size_bytes)

    def fetched_bytes(self, by_encoding: Mapping[Encoding, int]) -> None:
        """Count bytes that a fetch delivered; `received` counts them, too."""
        for encoding, size_bytes in by_encoding.items():
            with REGISTRY_LOCK:
                _FETCHED_BYTES.labels(encoding.family).inc(size_bytes)
            self._add(f"fetched_{encoding.family}", size_bytes)

    def stored(self, chunks: int, size_bytes: int, encoding: Encoding) -> None:
        """Count new chunks of which nodes took `size_bytes`, all copies together."""
        with REGISTRY_LOCK:
            _BYTES.labels("out").inc(size_bytes)
            _STORED_BYTES.labels(encoding.family).inc(size_bytes)
        self._add("bytes_out", size_bytes)
        self._add(f"stored_{encoding.family}", size_bytes)
        self._add("chunks_stored", chunks)

    def under_replicated(self, chunks: int) -> None:
        with REGISTRY_LOCK:
            _UNDER_REPLICATED.inc(chunks)
        self._add("chunks_under_replicated", chunks)

    def failed_over(self, reason: MissReason) -> None:
        with REGISTRY_LOCK:
            _FAILOVERS.labels(reason).inc()
        self._add(f"failover_{reason}", 1)

    def fetched(self, timeline: Timeline, fetch_s: float) -> None:
        """Count a finished fetch that took `fetch_s`. Stage times include what the timeline has recorded so far."""
        with REGISTRY_LOCK:
            _FETCH_S.observe(fetch_s)
        for stage in STAGES:
            if busy_s := timeline.busy_s(stage):
                with REGISTRY_LOCK:
                    _STAGE_S.labels(stage).observe(busy_s)
        self._add("fetches", 1)

    def predicted(self, fetch_s: float, took_s: float) -> None:
        """Count a finished fetch that took `took_s`, and by its first plan was to take `fetch_s`."""
        with REGISTRY_LOCK:
            _PREDICTED_S.observe(fetch_s)
            if fetch_s > 0:
                _PREDICTION_RATIO.observe(took_s / fetch_s)
        with self._lock:
            self._predicted_s.append(fetch_s)
        self._add("fetches_predicted", 1)

    def take_predictions(self) -> tuple[float, ...]:
        """How long fetches were to take, those counted since the last call, the latest ones."""
        with self._lock:
            predicted_s = tuple(self._predicted_s)
            self._predicted_s.clear()
        return predicted_s

    def planned(self, *, fetched: int, computed: int) -> None:
        """Count matched chunks by the final decision."""
        with REGISTRY_LOCK:
            _PLANNED.labels("fetch").inc(fetched)
            _PLANNED.labels("compute").inc(computed)
        self._add("chunks_planned_fetch", fetched)
        self._add("chunks_planned_compute", computed)

    def replanned(self) -> None:
        with REGISTRY_LOCK:
            _REPLANS.inc()
        self._add("replans", 1)

    def waiting_for_kv(self, change: int) -> None:
        """Change the number of requests that wait for KV."""
        with REGISTRY_LOCK:
            _WAITING.inc(change)
        self._add("waiting_for_kv", change)

    def guarded(self, frames: Mapping[str, int]) -> None:
        """Count frames that the codec's guard treated, by treatment: "finer" or "exact"."""
        for action, count in frames.items():
            with REGISTRY_LOCK:
                _GUARDED.labels(action).inc(count)
            self._add(f"guarded_{action}", count)

    def reprefilled(self, report: ReprefillReport) -> None:
        """Count the frames of a question that attended to a part of its prefix."""
        for result, frames in {
            "read": report.frames_needed - report.frames_cached - report.frames_missing,
            "cached": report.frames_cached,
            "missing": report.frames_missing,
        }.items():
            with REGISTRY_LOCK:
                _FRAMES.labels(result).inc(frames)
            self._add(f"frames_{result}", frames)
        for reason, frames in report.missing.items():
            lost = (
                f"{frames} frames of a prefix cannot be had ({reason}); a question is answered without them"
            )
            self.missed(reason, events=frames, detail=lost)

    def prompt(self, *, reused_tokens: int, computed_tokens: int) -> None:
        with REGISTRY_LOCK:
            _TOKENS.labels("reused").inc(reused_tokens)
            _TOKENS.labels("computed").inc(computed_tokens)
        self._add("tokens_reused", reused_tokens)
        self._add("tokens_computed", computed_tokens)

    def paged(self, operation: str, ok: int, reasons: Mapping[str, int]) -> None:
        """Count the pages of a job: the `ok` ones, and the others by reason."""
        for outcome, pages in {"ok": ok, **reasons}.items():
            with REGISTRY_LOCK:
                _PAGES.labels(operation, outcome).inc(pages)
            self._add(f"pages_{operation}_{outcome}", pages)

    @property
    def changes(self) -> int:
        """Grows with each count, so that nobody copies counts to learn that there is nothing new."""
        return self._changes

    def snapshot(self) -> dict[str, int]:
        with self._lock:
            return dict(self._counts)

    def _add(self, name: str, amount: int) -> None:
        with self._lock:
            self._counts[name] += amount
            self._changes += 1
