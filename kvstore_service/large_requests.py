"""Serves large requests one at a time, so that small requests do not wait for them. A request is large if it is long,
if its answer is long, or if it takes the node long."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from kvstore_codec.errors import AbandonedRequestError, BusyError

SMALL_BYTES = 512 << 10
"""A longer request is large. A lookup of 7,000 chunks (a prompt of 1.8 million tokens) is still small."""
MAX_WAITING = 16
"""Large requests in the queue. Each holds a thread and its bytes, up to 8 MiB."""
MAX_WAITING_OF_PEER = 2
PATIENCE_S = 10.0
MAX_KEPT_BYTES = 64 << 20
MAX_KEPT_BYTES_OF_PEER = 16 << 20
"""Bytes of large requests whose answers are being streamed. A parsed request takes eight times its bytes."""
_LOOK_S = 0.1
_ADVICE = (
    f"try again later, or send smaller requests: up to {SMALL_BYTES} bytes with a short answer need not wait"
)


class LargeRequests:
    """Serves large requests one at a time, in the order of their arrival. Several at a time would not be faster,
    because Python computes in one thread, and each takes up to 200 MiB. Thread-safe."""

    def __init__(self) -> None:
        self._served = _Served()
        self._changed = threading.Condition()
        self._queue: list[_Request] = []  # the first one is being served
        self._kept_bytes: Counter[str] = Counter()  # by connection

    @contextmanager
    def admitted(self, peer: str, is_active: Callable[[], bool], *, size_bytes: int) -> Iterator[None]:
        """Admits a request of the connection `peer` for the duration of the block. A request of at most SMALL_BYTES is
        admitted at once. A large one waits for its turn, and raises the errors of `wait_for_turn`."""
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
        """Blocks until it is the turn of the request that this thread serves. Called when a request turns out to be
        large, whatever its size. Returns at once if the request already has its turn. Raises BusyError if too many
        requests wait, or if the turn does not come within PATIENCE_S, and AbandonedRequestError if the client has
        disconnected."""
        request = self._served.request
        if request is None:
            raise RuntimeError("this thread serves no admitted request")
        if not request.has_queued:
            self._queue_up(request)

    @contextmanager
    def kept(self, peer: str, *, size_bytes: int) -> Iterator[None]:
        """Counts the bytes of a large request while the block runs. Raises BusyError if the connection, or all
        connections together, would exceed its limit."""
        if size_bytes <= SMALL_BYTES:
            yield
            return
        with self._changed:
            if (
                self._kept_bytes[peer] + size_bytes > MAX_KEPT_BYTES_OF_PEER
                or self._kept_bytes.total() + size_bytes > MAX_KEPT_BYTES
            ):
                raise BusyError(
                    f"requests of {self._kept_bytes.total()} bytes are already being answered; {_ADVICE}"
                )
            self._kept_bytes[peer] += size_bytes
        try:
            yield
        finally:
            with self._changed:
                self._kept_bytes[peer] -= size_bytes
                self._kept_bytes += Counter()  # removes connections whose count is zero

    def _queue_up(self, request: "_Request") -> None:
        until_s = time.monotonic() + PATIENCE_S
        with self._changed:
            of_peer = sum(other.peer == request.peer for other in self._queue)
            if len(self._queue) > MAX_WAITING or of_peer > MAX_WAITING_OF_PEER:
                raise BusyError(
                    f"{len(self._queue)} large requests are already being served or wait; {_ADVICE}"
                )
            self._queue.append(request)
            request.has_queued = True
            while self._queue[0] is not request:
                self._changed.wait(_LOOK_S)
                if not request.is_active():
                    raise AbandonedRequestError("the client disconnected while its request waited")
                if time.monotonic() > until_s:
                    raise BusyError(f"other large requests took longer than {PATIENCE_S:.0f} s; {_ADVICE}")


@dataclass(slots=True, eq=False)
class _Request:
    peer: str
    is_active: Callable[[], bool]
    has_queued: bool = False


class _Served(threading.local):
    request: _Request | None = None
