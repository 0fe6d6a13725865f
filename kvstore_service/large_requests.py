"""Large requests wait for each other, so that small ones need not wait for them. Large is what is long itself, what has
a long answer, and what takes the node long."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from kvstore_codec.errors import AbandonedRequestError, BusyError

SMALL_BYTES = 512 << 10
"""A request of more bytes is large. A lookup of 7,000 chunks, a prompt of 1.8 million tokens, is not."""
MAX_WAITING = 16
"""Large requests that wait to be served: each keeps a thread and its bytes, up to 8 MiB."""
MAX_WAITING_OF_PEER = 2
PATIENCE_S = 10.0
MAX_KEPT_BYTES = 64 << 20
MAX_KEPT_BYTES_OF_PEER = 16 << 20
"""Large requests that are kept while their answers are streamed; parsed they take eight times as much."""
_LOOK_S = 0.1
_ADVICE = (
    f"try again later, or ask for less at a time: up to {SMALL_BYTES} bytes with a short answer do not wait"
)


class LargeRequests:
    """Serves large requests one at a time, in the order in which they came: more at a time are not faster, because
    Python computes in one thread, and each takes up to 200 MiB. Thread-safe."""

    def __init__(self) -> None:
        self._served = _Served()
        self._changed = threading.Condition()
        self._queue: list[_Request] = []  # the first one is being served
        self._kept_bytes: Counter[str] = Counter()  # by connection

    @contextmanager
    def admitted(self, peer: str, is_active: Callable[[], bool], *, size_bytes: int) -> Iterator[None]:
        """Serves a request of the connection `peer` in the block; one of at most SMALL_BYTES at once, a large one when
        its turn comes, as `wait_for_turn` says."""
        request = self._served.request = _Request(peer, is_active)
        try:
            if size_bytes > SMALL_BYTES:
                self.wait_for_turn()
            yield
        finally:
            self._served.request = None
            if request.has_queued:
                with self._changed:
                    self._queue.remove(request)
                    self._changed.notify_all()

    def wait_for_turn(self) -> None:
        """For a request that this thread serves and that turns out to be large, whatever its size; returns at once when
        its turn has come before. Raises BusyError when too many wait or the turn does not come within PATIENCE_S, and
        AbandonedRequestError when the client has gone meanwhile."""
        request = self._served.request
        if request is None:
            raise RuntimeError("this thread serves no request that was admitted")
        if not request.has_queued:
            self._queue_up(request)

    @contextmanager
    def kept(self, peer: str, *, size_bytes: int) -> Iterator[None]:
        """Counts a large request that is in memory as long as the block runs. Raises BusyError when there are too
        many."""
        if size_bytes <= SMALL_BYTES:
            yield
            return
        with self._changed:
            if (
                self._kept_bytes[peer] + size_bytes > MAX_KEPT_BYTES_OF_PEER
                or self._kept_bytes.total() + size_bytes > MAX_KEPT_BYTES
            ):
                raise BusyError(
                    f"requests of {self._kept_bytes.total()} bytes are being answered already; {_ADVICE}"
                )
            self._kept_bytes[peer] += size_bytes
        try:
            yield
        finally:
            with self._changed:
                self._kept_bytes[peer] -= size_bytes
                self._kept_bytes += Counter()  # without the connections that have none

    def _queue_up(self, request: "_Request") -> None:
        until_s = time.monotonic() + PATIENCE_S
        with self._changed:
            of_peer = sum(other.peer == request.peer for other in self._queue)
            if len(self._queue) > MAX_WAITING or of_peer > MAX_WAITING_OF_PEER:
                raise BusyError(f"{len(self._queue)} large requests are under way already; {_ADVICE}")
            self._queue.append(request)
            request.has_queued = True
            while self._queue[0] is not request:
                self._changed.wait(_LOOK_S)
                if not request.is_active():
                    raise AbandonedRequestError("the client has gone while its request waited")
                if time.monotonic() > until_s:
                    raise BusyError(f"other large requests took all of {PATIENCE_S:.0f} s; {_ADVICE}")


@dataclass(slots=True, eq=False)
class _Request:
    peer: str
    is_active: Callable[[], bool]
    has_queued: bool = False


class _Served(threading.local):
    request: _Request | None = None
