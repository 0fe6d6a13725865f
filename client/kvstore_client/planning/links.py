"""Bandwidth of each endpoint, estimated from its latest transfers.

KVFetcher (arXiv 2602.09725) uses the bandwidth of the previous chunk for the next one. A single chunk is too short a
sample where it takes a millisecond, so the estimate covers the last tenth of a second of receiving.
"""

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from kvstore_client.fork import renew_in_children

DEFAULT_BANDWIDTH_Bps = 125e6
"""Bandwidth of an endpoint before any endpoint has sent anything: 1 Gbit/s."""

WINDOW_S = 0.1
"""Receiving time that an estimate covers, seconds. Longer is steadier, shorter follows a step faster."""

_SAMPLE_S, _SAMPLE_BYTES = 0.005, 256 << 10
"""A transfer below both limits is merged with the next: a clock tick or one buffer says nothing about a link."""

_STALE_S = 2.0
"""After this much silence, in seconds, the next sample replaces all earlier ones. Until then they are the best
estimate."""

_HOPE_S = 30.0
"""Doubling time, in seconds, of an unconfirmed estimate, up to the default: otherwise a link that is too slow for any
fetch would never be tried again."""

_MEAN_S = 2.0
"""Receiving time, in seconds, of which a mean remembers 63 %."""

_MOST_SAMPLES = 1024
"""Limit on the samples in a window: transfers from memory produce more than are useful."""
_SHORTEST_S = 1e-6

_LATENCY_SHARE = 0.25


LEAST_BUSY_Bps = 40e6
"""Assumed bandwidth while the engine computes, before any measurement, unless the link itself is slower."""
_BUSY_SHARE = 0.33
"""Below this share of the bandwidth that computing explains, the link itself is slow."""
_CLEARLY = 0.7
_LEARNING = 0.25

_DOUBT_S = 5.0
"""Half-life, in seconds, for decaying the idle-bandwidth estimate toward the busy one."""


@dataclass(slots=True)
class _Window:
    """The last tenth of a second of receiving."""

    samples: deque[tuple[int, float, float]] = field(default_factory=deque)
    """(bytes, seconds of receiving, time of arrival)."""
    size_bytes: int = 0
    seconds: float = 0.0
    """Sums over the samples."""
    pending_bytes: int = 0
    pending_s: float = 0.0
    """Transfers too small for a sample yet."""
    seen_s: float = -math.inf
    """Time of the last sample."""
    mean_bytes: float = 0.0
    mean_s: float = 0.0
    """Decayed sums over all samples."""

    def add(self, size_bytes: int, seconds: float, now_s: float) -> bool:
        """Add a transfer; returns whether it completed a sample."""
        self.pending_bytes += size_bytes
        self.pending_s += seconds
        if self.pending_s < _SAMPLE_S and self.pending_bytes < _SAMPLE_BYTES:
            return False
        silent_s = now_s - self.seen_s
        if silent_s > _STALE_S:
            self.samples.clear()
            self.size_bytes, self.seconds = 0, 0.0
        fading = math.exp(-self.pending_s / _MEAN_S - max(silent_s, 0.0) / _HOPE_S)
        self.mean_bytes = fading * self.mean_bytes + self.pending_bytes
        self.mean_s = fading * self.mean_s + self.pending_s
        self.seen_s = now_s
        self.samples.append((self.pending_bytes, self.pending_s, now_s))
        self.size_bytes += self.pending_bytes
        self.seconds += self.pending_s
        self.pending_bytes, self.pending_s = 0, 0.0
        while self.seconds - self.samples[0][1] >= WINDOW_S or len(self.samples) > _MOST_SAMPLES:
            old_bytes, old_s, _ = self.samples.popleft()
            self.size_bytes -= old_bytes
            self.seconds -= old_s
        return True

    @property
    def rate_Bps(self) -> float:  # noqa: N802
        return self.size_bytes / max(self.seconds, _SHORTEST_S)

    def rate_since_Bps(self, since_s: float) -> float:  # noqa: N802
        """Rate of the last tenth of a second, as far as it was after `since_s`; for the rest of it, the mean."""
        size_bytes, seconds = 0.0, 0.0
        for sample_bytes, sample_s, at_s in reversed(self.samples):
            if at_s <= since_s:
                break
            size_bytes, seconds = size_bytes + sample_bytes, seconds + sample_s
        older_s = max(WINDOW_S - seconds, 0.0)
        size_bytes += older_s * self.mean_bytes / max(self.mean_s, _SHORTEST_S)
        return size_bytes / max(seconds + older_s, _SHORTEST_S)


@dataclass(slots=True)
class _Link:
    quiet: _Window = field(default_factory=_Window)
    busy: _Window = field(default_factory=_Window)
    """Transfers while the engine computes: engine, receiver and, on one machine, the sender slow each other."""
    busy_Bps: float | None = None  # noqa: N815  (bytes, not bits)
    """Bandwidth observed meanwhile, except where the link itself was slow."""
    latency_s: float | None = None

    @property
    def seen_s(self) -> float:
        return max(self.quiet.seen_s, self.busy.seen_s)

    def bandwidth_Bps(  # noqa: N802
        self,
        now_s: float,
        since_s: float | None,
    ) -> float | None:
        if not self.seen_s > -math.inf:
            return None
        seen_Bps = self.quiet.rate_Bps if since_s is None else self.quiet.rate_since_Bps(since_s)  # noqa: N806
        if self.busy.seen_s > self.quiet.seen_s:
            slower_Bps = self.busy.rate_Bps  # noqa: N806
            if not self.quiet.samples or slower_Bps > seen_Bps or self._is_links_doing(slower_Bps):
                seen_Bps = slower_Bps  # noqa: N806
            else:  # the longer the engine computes, the less is known about the idle bandwidth
                doubt = max(self.busy.seen_s - self.quiet.seen_s - _STALE_S, 0.0) / _DOUBT_S
                seen_Bps = slower_Bps + (seen_Bps - slower_Bps) * 2.0**-doubt  # noqa: N806
        unseen_s = now_s - self.seen_s - _STALE_S
        if unseen_s <= 0 or seen_Bps >= DEFAULT_BANDWIDTH_Bps:
            return seen_Bps
        hope: float = 2.0 ** min(unseen_s / _HOPE_S, 64.0)
        return min(DEFAULT_BANDWIDTH_Bps, seen_Bps * hope)

    def learn(self, *, busy: bool) -> None:
        """Learn the busy bandwidth, once a window is full."""
        seen_Bps, quiet_Bps = self.busy.rate_Bps, self.quiet.rate_Bps  # noqa: N806
        if busy and self.busy.seconds >= WINDOW_S:
            if seen_Bps > self._explained_Bps:
                self.busy_Bps = seen_Bps
            elif (
                self.quiet.samples and seen_Bps < _CLEARLY * quiet_Bps and not self._is_links_doing(seen_Bps)
            ):
                self.busy_Bps = self._explained_Bps + _LEARNING * (seen_Bps - self._explained_Bps)
        elif (
            not busy
            and self.busy.samples
            and self.quiet.seconds >= WINDOW_S
            and self.quiet.samples[0][2] > self.busy.seen_s
            and self.quiet.seen_s - self.busy.seen_s < _STALE_S
            and seen_Bps < _CLEARLY * quiet_Bps
            and self._is_links_doing(seen_Bps)
        ):
            # The link is fast again as soon as the engine stops: the engine was the cause.
            self.busy_Bps = seen_Bps

    @property
    def _explained_Bps(self) -> float:  # noqa: N802
        return LEAST_BUSY_Bps if self.busy_Bps is None else self.busy_Bps

    def _is_links_doing(self, busy_Bps: float) -> bool:  # noqa: N803
        """Whether the link itself, and not the engine's work, explains this low bandwidth."""
        return busy_Bps < _BUSY_SHARE * self._explained_Bps


@dataclass(slots=True, eq=False)
class _Pass:
    request: object
    waits: bool
    ended_s: float = math.inf


class Links:
    """Links of one client, shared by its fetches. Thread-safe.

    BBR (ACM Queue 14:5, 2016) does not let application-limited samples lower its estimate of a link. Likewise, samples
    taken while the engine computes do not lower this estimate, unless they are lower than computing explains.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._links: dict[str, _Link] = {}
        self._renew()
        renew_in_children(self, Links._renew)

    def _renew(self) -> None:
        """Reset in a forked child: threads that held the lock or computed in the parent do not exist there."""
        self._lock = threading.Lock()
        self._passes: list[_Pass] = []
        self._forgot_s = -math.inf
        """When passes that have ended long ago were last dropped. Not after each pass: there may be hundreds in a
        second."""

    def keep(self, endpoints: Collection[str]) -> None:
        """Forget all other endpoints, except the last one heard of, which stands for unknown endpoints."""
        with self._lock:
            last = max(self._links, key=lambda endpoint: self._links[endpoint].seen_s, default=None)
            gone = self._links.keys() - set(endpoints) - {last}
            for endpoint in gone:
                del self._links[endpoint]

    @contextmanager
    def computing(self, *, request: object = None, waits: bool = False) -> Iterator[None]:
        """Inside the block the engine computes for this request. `waits`: it computes little and mostly waits for KV of
        that request."""
        one = _Pass(request, waits)
        with self._lock:
            self._passes.append(one)
        try:
            yield
        finally:
            with self._lock:
                one.ended_s = self._clock()
                if one.ended_s > self._forgot_s + _STALE_S:
                    self._forgot_s = one.ended_s
                    self._passes = [p for p in self._passes if p.ended_s > one.ended_s - _STALE_S]

    def observe(
        self,
        endpoint: str,
        size_bytes: int,
        seconds: float,
        *,
        request: object = None,
        waited_for: bool = False,
    ) -> None:
        """Record that a reader received `size_bytes`. `seconds` is the time it waited for them and received them,
        without the time in which it had no room. `waited_for`: the engine does nothing but wait for this request."""
        with self._lock:
            link = self._links.setdefault(endpoint, _Link())
            now_s = self._clock()
            busy = any(
                p.ended_s > now_s - seconds
                and not (p.request is request and request is not None and (p.waits or waited_for))
                for p in self._passes
            )
            window = link.busy if busy else link.quiet
            if window.add(size_bytes, seconds, now_s):
                link.learn(busy=busy)

    @property
    def is_computing(self) -> bool:
        with self._lock:
            return any(one.ended_s == math.inf for one in self._passes)

    def idle_s(self) -> float:
        """Seconds since the engine computed: 0 while it does, infinity where it did not lately."""
        with self._lock:
            last_s = max((one.ended_s for one in self._passes), default=-math.inf)
            return max(0.0, self._clock() - last_s)

    def busy_Bps(self, endpoint: str) -> float | None:  # noqa: N802
        """Highest bandwidth of the endpoint while the engine computes; None when it was never observed."""
        with self._lock:
            link = self._links.get(endpoint)
            return link.busy_Bps if link is not None else None

    def first_byte(self, endpoint: str, seconds: float) -> None:
        """Record the latency from a request to the first byte of its answer."""
        with self._lock:
            link = self._links.setdefault(endpoint, _Link())
            known_s = seconds if link.latency_s is None else link.latency_s
            link.latency_s = known_s + _LATENCY_SHARE * (seconds - known_s)

    def first_piece_s(self, endpoint: str, size_bytes: int, seconds: float) -> float:
        """Record the latency of a request whose first `size_bytes` came after `seconds`. Returns the part of that time
        that counts as receiving them."""
        bandwidth_Bps = self.bandwidth_Bps(endpoint)  # noqa: N806
        if bandwidth_Bps:
            self.first_byte(endpoint, max(0.0, seconds - size_bytes / bandwidth_Bps))
        return max(seconds - self.latency_s(endpoint), seconds / 2)

    def bandwidth_Bps(self, endpoint: str, *, since_s: float | None = None) -> float | None:  # noqa: N802
        """Bandwidth over the last tenth of a second. With `since_s` (of the clock), transfers before that count as the
        mean of the last seconds: on a varying link the end of the last fetch says little about the next one.

        An unknown endpoint gets the bandwidth of the endpoint heard of last. None when nothing was ever received.
        """
        with self._lock:
            link = self._links.get(endpoint)
            if link is None or not link.seen_s > -math.inf:
                link = max(self._links.values(), key=lambda other: other.seen_s, default=None)
            if link is None:
                return None
            return link.bandwidth_Bps(self._clock(), since_s)

    def snapshot(self) -> dict[str, tuple[float, float]]:
        """Bandwidth in bytes per second, and latency in seconds, of every endpoint that has sent something."""
        with self._lock:
            now_s, found = self._clock(), {}
            for endpoint, link in self._links.items():
                bandwidth_Bps = link.bandwidth_Bps(now_s, None)  # noqa: N806
                if bandwidth_Bps is not None:
                    found[endpoint] = bandwidth_Bps, link.latency_s or 0.0
            return found

    def latency_s(self, endpoint: str) -> float:
        """Latency of the endpoint, seconds; 0 for an unknown one."""
        with self._lock:
            link = self._links.get(endpoint)
            return (link.latency_s or 0.0) if link is not None else 0.0
