"""Counters of what reuse did and why it did not: for Prometheus, and readable in the process."""

import threading
from collections import Counter as Counts
from collections.abc import Mapping

from prometheus_client import Counter

_CHUNKS = Counter("kvstore_client_chunks", "Chunks a fetch asked for, by how they ended.", ["result"])
_MISSES = Counter("kvstore_client_misses", "Reuse that did not happen, by reason.", ["reason"])
_BYTES = Counter("kvstore_client_bytes", "Bytes of chunks moved, by direction.", ["direction"])
_UNDER_REPLICATED = Counter(
    "kvstore_client_under_replicated_chunks",
    "Chunks stored on fewer nodes than they should be; the cluster's repair makes up for it.",
)
_FAILOVERS = Counter(
    "kvstore_client_failovers",
    "Times a fetch went on with another node that holds the same chunks, by what was wrong with the first.",
    ["reason"],
)
_GUARDED = Counter(
    "kvstore_client_guarded_frames",
    "Frames unlike the calibration's text that were coded with a finer step, or exactly.",
    ["action"],
)
_TOKENS = Counter("kvstore_client_tokens", "Prompt tokens, by where their KV came from.", ["source"])


class ClientMetrics:
    """Counts for one client; every count also goes to the process-wide Prometheus registry. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counts[str] = Counts()

    def delivered(self, chunks: int) -> None:
        _CHUNKS.labels("delivered").inc(chunks)
        self._add("chunks_delivered", chunks)

    def missed(self, reason: str, chunks: int = 0, *, events: int = 1) -> None:
        """Count events of not reusing for `reason`, which cost `chunks` chunks that had been promised."""
        _MISSES.labels(reason).inc(events)
        _CHUNKS.labels("missing").inc(chunks)
        self._add(f"miss_{reason}", events)
        self._add("chunks_missing", chunks)

    def received(self, size_bytes: int) -> None:
        _BYTES.labels("in").inc(size_bytes)
        self._add("bytes_in", size_bytes)

    def stored(self, chunks: int, size_bytes: int) -> None:
        _BYTES.labels("out").inc(size_bytes)
        self._add("bytes_out", size_bytes)
        self._add("chunks_stored", chunks)

    def under_replicated(self, chunks: int) -> None:
        _UNDER_REPLICATED.inc(chunks)
        self._add("chunks_under_replicated", chunks)

    def failed_over(self, reason: str) -> None:
        _FAILOVERS.labels(reason).inc()
        self._add(f"failover_{reason}", 1)

    def guarded(self, frames: Mapping[str, int]) -> None:
        """Count frames that the codec's guard treated, by what it did: "finer" or "exact"."""
        for action, count in frames.items():
            _GUARDED.labels(action).inc(count)
            self._add(f"guarded_{action}", count)

    def prompt(self, *, reused_tokens: int, computed_tokens: int) -> None:
        _TOKENS.labels("reused").inc(reused_tokens)
        _TOKENS.labels("computed").inc(computed_tokens)
        self._add("tokens_reused", reused_tokens)
        self._add("tokens_computed", computed_tokens)

    def snapshot(self) -> dict[str, int]:
        with self._lock:
            return dict(self._counts)

    def _add(self, name: str, amount: int) -> None:
        with self._lock:
            self._counts[name] += amount
