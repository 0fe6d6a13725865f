"""Fetch-aware admission: requests that wait for their KV do not block the engine's queue.

KVFetcher (arXiv 2602.09725) calls this `waiting_for_kv`: an engine that takes requests in order would idle behind one
whose KV arrives over a slow link, although later requests could compute.
"""

import heapq
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Generic, Literal, Protocol, TypeVar

from kvstore_client.metrics import ClientMetrics
from kvstore_client.threads import single_threaded

log = logging.getLogger(__name__)

Request = TypeVar("Request")


class Arrival(Protocol):
    """KV that a request waits for. The queue holds no lock when it calls these methods."""

    @property
    def size_bytes(self) -> int:
        """Memory that `start` allocates. It is released when the request has been answered, or by `cancel`."""

    def start(self) -> None:
        """Start the fetch. Called at most once, in a thread of the queue, when there is room; other requests wait
        meanwhile. If it raises, the request is ready without its KV."""

    def on_ready(self, callback: Callable[[], object]) -> None:
        """Call `callback` once when nothing more will arrive, whether complete or not; at once if that is so already.
        Called after `start`."""

    def remaining_s(self) -> float:
        """Predicted seconds until the KV is ready. Called after `start`."""

    def cancel(self) -> None:
        """Abandon the fetch. Called at most once, after `start`."""


class _NothingToFetch:
    """The Arrival of a request that needs no KV."""

    size_bytes = 0

    def start(self) -> None:
        """Nothing to start."""

    def on_ready(self, callback: Callable[[], object]) -> None:
        callback()

    def remaining_s(self) -> float:
        return 0.0

    def cancel(self) -> None:
        """Nothing to cancel."""


@dataclass(slots=True, eq=False)
class _Entry(Generic[Request]):
    number: int
    request: Request
    kv: Arrival
    state: Literal["queued", "starting", "fetching", "ready", "taken", "gone"]
    is_fetching: bool = False
    held_bytes: int = 0


class AdmissionQueue(Generic[Request]):
    """Returns requests whose KV has arrived, or that need none, in the order of submission. Thread-safe.

    A request that waits for KV is passed by those that do not; the order is otherwise kept, so no request starves. At
    most `fetches` requests fetch at a time and hold at most `buffer_bytes` together (a single one may hold more). Later
    requests wait for their turn without having started. A request whose KV will not arrive is ready, too: the engine
    computes it. Requests are distinguished by identity.
    """

    def __init__(
        self, metrics: ClientMetrics, *, fetches: int, buffer_bytes: int, early_s: float = 0.0
    ) -> None:
        """An idle engine takes a request whose KV is predicted to arrive within `early_s`, and waits for the rest
        itself. That is also the longest wait that it can cause a request without KV, as far as the prediction holds."""
        self._metrics = metrics
        self._fetches, self._buffer_bytes, self._early_s = fetches, buffer_bytes, early_s
        self._changed = threading.Condition()
        self._entries: dict[int, _Entry[Request]] = {}
        """All unfinished requests, by identity of the request."""
        self._queued: deque[_Entry[Request]] = deque()
        self._ready: list[tuple[int, _Entry[Request]]] = []
        """A heap. Cancelled requests are skipped when they come up."""
        self._submitted = 0
        self._fetching = 0
        self._held_bytes = 0
        self._closed = False
        self._starter = threading.Thread(target=self._start_queued, name="kvstore-admission", daemon=True)
        self._starter.start()

    def submit(self, request: Request, waits_for: Arrival | None = None) -> None:
        """Queue a request. Raises ValueError for a request that is queued already, and after `close`."""
        with self._changed:
            if self._closed or id(request) in self._entries:
                raise ValueError(
                    "the queue is closed" if self._closed else "this request was submitted already"
                )
            self._submitted += 1
            entry = _Entry(self._submitted, request, waits_for or _NothingToFetch(), "queued")
            self._entries[id(request)] = entry
            if waits_for is None:
                self._make_ready(entry)
            else:
                self._metrics.waiting_for_kv(+1)
                self._queued.append(entry)
            self._changed.notify_all()

    def next_ready(self, timeout_s: float) -> Request | None:
        """The next request that can be computed; None after `timeout_s` or `close`. Call `finished` once it has been
        answered."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            near_s = self._admit_early()
            with self._changed:
                while self._ready:
                    _, entry = heapq.heappop(self._ready)
                    if entry.state == "ready":
                        entry.state = "taken"
                        return entry.request
                patience_s = deadline_s - time.monotonic()
                if self._closed or patience_s <= 0:
                    return None
                self._changed.wait(min(patience_s, near_s, threading.TIMEOUT_MAX))

    def finished(self, request: Request) -> None:
        """Report that this request was answered and its buffers are free."""
        with self._changed:
            entry = self._entries.pop(id(request))
            self._release(entry)

    def cancel(self, request: Request) -> bool:
        """Drop a request and end its fetch. False when the engine has taken it, or it is unknown."""
        with self._changed:
            entry = self._entries.get(id(request))
            if entry is None or entry.state == "taken":
                return False
            del self._entries[id(request)]
            started = entry.state in ("fetching", "ready")
            if entry.state == "queued":
                self._queued.remove(entry)
            if entry.state != "ready":
                self._metrics.waiting_for_kv(-1)
            if entry.state != "starting":  # the starting thread handles it
                self._release(entry)
            entry.state = "gone"
        if started:
            entry.kv.cancel()
        return True

    def close(self) -> list[Request]:
        """Cancel and return all requests that no engine has taken. `next_ready` returns None from now on."""
        with self._changed:
            self._closed = True
            left = [entry.request for entry in self._entries.values() if entry.state != "taken"]
            self._changed.notify_all()
        cancelled = [request for request in left if self.cancel(request)]
        self._starter.join()
        return cancelled

    @property
    def waiting(self) -> int:
        """Number of requests that wait for KV, started or not."""
        with self._changed:
            return sum(e.state in ("queued", "starting", "fetching") for e in self._entries.values())

    @single_threaded()
    def _start_queued(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._has_room())
                if self._closed:
                    return
                entry = self._queued.popleft()
                entry.state, entry.is_fetching, entry.held_bytes = "starting", True, entry.kv.size_bytes
                self._fetching += 1
                self._held_bytes += entry.held_bytes
            started = self._started(entry.kv)
            with self._changed:
                cancelled = self._entries.get(id(entry.request)) is not entry
                if cancelled:
                    self._release(entry)
                elif started:
                    entry.state = "fetching"
                else:
                    entry.kv = _NothingToFetch()  # a fetch that never started cannot be cancelled
                    self._arrived(entry)
            try:
                if cancelled and started:
                    entry.kv.cancel()
                elif started:
                    entry.kv.on_ready(partial(self._on_ready, entry))
            except Exception:  # treated as if nothing arrived: the next requests must start
                log.exception("the fetch of a request cannot be followed: the request will be computed")
                self._on_ready(entry)
            del entry  # an idle queue must not keep buffers alive

    @staticmethod
    def _started(kv: Arrival) -> bool:
        try:
            kv.start()
        except Exception:
            # The request is answered whatever is wrong with reuse.
            log.exception("the fetch of a request cannot start: the request will be computed")
            return False
        return True

    def _has_room(self) -> bool:
        if not self._queued or self._fetching >= self._fetches:
            return False
        return not self._held_bytes or self._held_bytes + self._queued[0].kv.size_bytes <= self._buffer_bytes

    def _on_ready(self, entry: _Entry[Request]) -> None:
        with self._changed:
            self._arrived(entry)

    def _admit_early(self) -> float:
        """Make the first request ready whose KV is near, if none is ready. Returns the seconds until the next check."""
        if self._early_s <= 0:
            return math.inf
        with self._changed:
            if self._ready:
                return 0.0
            fetching = [entry for entry in self._entries.values() if entry.state == "fetching"]
        soonest_s = math.inf
        for entry in fetching:
            remaining_s = entry.kv.remaining_s()
            if remaining_s <= self._early_s:
                with self._changed:
                    if entry.state == "fetching":
                        self._metrics.waiting_for_kv(-1)
                        self._make_ready(entry)
                return 0.0
            soonest_s = min(soonest_s, remaining_s - self._early_s)
        return max(soonest_s, self._early_s / 4)  # predictions change; checking is cheap

    # ---- with the lock held

    def _arrived(self, entry: _Entry[Request]) -> None:
        if entry.is_fetching:
            entry.is_fetching = False
            self._fetching -= 1
        if entry.state in ("starting", "fetching"):
            self._metrics.waiting_for_kv(-1)
            self._make_ready(entry)
        self._changed.notify_all()

    def _make_ready(self, entry: _Entry[Request]) -> None:
        entry.state = "ready"
        heapq.heappush(self._ready, (entry.number, entry))

    def _release(self, entry: _Entry[Request]) -> None:
        self._fetching -= entry.is_fetching
        self._held_bytes -= entry.held_bytes
        entry.is_fetching, entry.held_bytes = False, 0
        self._changed.notify_all()
