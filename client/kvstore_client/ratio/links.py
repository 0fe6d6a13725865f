"""How fast bytes come from each endpoint, from the last transfers rather than from all there ever were.

KVFetcher (arXiv 2602.09725) takes the bandwidth that the previous chunk saw for the next one's. A single chunk is too
little to go by where it takes a millisecond, so here it is the last tenth of a second of receiving.
"""

import math
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

DEFAULT_BANDWIDTH_Bps = 125e6
"""1 Gbit/s: of an endpoint when none has sent anything yet."""

WINDOW_S = 0.1
"""Receiving time that an estimate covers. Longer is steadier, shorter is quicker to see a step."""

_SAMPLE_S, _SAMPLE_BYTES = 0.005, 256 << 10
"""Less than both is one sample with what comes next: a clock's tick or a buffer's worth says nothing about a link."""

_STALE_S = 2.0
"""After so long a silence the next sample replaces all before it. Until then they are the best there is."""

_HOPE_S = 30.0
"""An estimate that nobody has seen confirmed doubles in this time, up to the default: a link too slow to be worth a
fetch would otherwise never be tried again."""

_MOST_SAMPLES = 1024
"""From memory, a window has more of them than tell anything."""
_SHORTEST_S = 1e-6

_LATENCY_SHARE = 0.25


@dataclass(slots=True)
class _Link:
    samples: deque[tuple[int, float]] = field(default_factory=deque)
    size_bytes: int = 0
    seconds: float = 0.0
    """Sums over the samples."""
    pending_bytes: int = 0
    pending_s: float = 0.0
    """Too little for a sample yet."""
    seen_s: float = -math.inf
    """When the last sample came."""
    latency_s: float | None = None

    def add(self, size_bytes: int, seconds: float, now_s: float) -> None:
        self.pending_bytes += size_bytes
        self.pending_s += seconds
        if self.pending_s < _SAMPLE_S and self.pending_bytes < _SAMPLE_BYTES:
            return
        if now_s - self.seen_s > _STALE_S:
            self.samples.clear()
            self.size_bytes, self.seconds = 0, 0.0
        self.seen_s = now_s
        self.samples.append((self.pending_bytes, self.pending_s))
        self.size_bytes += self.pending_bytes
        self.seconds += self.pending_s
        self.pending_bytes, self.pending_s = 0, 0.0
        while self.seconds - self.samples[0][1] >= WINDOW_S or len(self.samples) > _MOST_SAMPLES:
            old_bytes, old_s = self.samples.popleft()
            self.size_bytes -= old_bytes
            self.seconds -= old_s

    def bandwidth_Bps(self, now_s: float) -> float | None:  # noqa: N802
        if not self.samples:
            return None
        seen_Bps: float = self.size_bytes / max(self.seconds, _SHORTEST_S)  # noqa: N806
        unseen_s = now_s - self.seen_s - _STALE_S
        if unseen_s <= 0 or seen_Bps >= DEFAULT_BANDWIDTH_Bps:
            return seen_Bps
        hope: float = 2.0 ** min(unseen_s / _HOPE_S, 64.0)
        return min(DEFAULT_BANDWIDTH_Bps, seen_Bps * hope)


class Links:
    """Of one client, shared by its fetches. Thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._links: dict[str, _Link] = {}

    def observe(self, endpoint: str, size_bytes: int, seconds: float) -> None:
        """A reader has received `size_bytes`, and `seconds` is the time it waited for them and took them in: without
        the time in which it had no room for more."""
        with self._lock:
            self._links.setdefault(endpoint, _Link()).add(size_bytes, seconds, self._clock())

    def first_byte(self, endpoint: str, seconds: float) -> None:
        """It took `seconds` from a request to the first byte of its answer."""
        with self._lock:
            link = self._links.setdefault(endpoint, _Link())
            known_s = seconds if link.latency_s is None else link.latency_s
            link.latency_s = known_s + _LATENCY_SHARE * (seconds - known_s)

    def bandwidth_Bps(self, endpoint: str) -> float | None:  # noqa: N802
        """Of an endpoint not heard of yet: that of the one heard of last. None when nothing was ever received."""
        with self._lock:
            link = self._links.get(endpoint)
            if link is None or not link.samples:
                link = max(self._links.values(), key=lambda other: other.seen_s, default=None)
            return link.bandwidth_Bps(self._clock()) if link is not None else None

    def latency_s(self, endpoint: str) -> float:
        """0 for an endpoint that was never asked."""
        with self._lock:
            link = self._links.get(endpoint)
            return (link.latency_s or 0.0) if link is not None else 0.0
