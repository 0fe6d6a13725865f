"""Answers that wait in memory for their clients to take them."""

import threading
from collections import defaultdict
from dataclasses import dataclass, field

import grpc

CALL_BYTES = 24 << 10
"""What a call that waits for its client takes besides its answer: 22 KiB, measured with 6,000 empty answers."""
MAX_BYTES_OF_PEER = 96 << 20
"""Of one connection: the largest answer and a half, or 4,096 of the smallest."""
MAX_BYTES = 256 << 20


class UnsentAnswers:
    """Keeps what waits within MAX_BYTES_OF_PEER and MAX_BYTES, the calls themselves included: a client that asks and
    does not read has its oldest calls cancelled. gRPC counts a call among those under way only until its answer was
    made. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: defaultdict[str, _Waiting] = defaultdict(_Waiting)  # by connection
        self._bytes = 0

    @property
    def waiting_bytes(self) -> int:
        return self._bytes

    def add(self, context: grpc.ServicerContext, answer_bytes: int) -> None:
        """Counts an answer until its call has ended. Cancels others before it, the oldest of this connection and then
        of whichever has most, where they are too many."""
        peer, size_bytes = context.peer(), CALL_BYTES + answer_bytes
        excess: list[grpc.ServicerContext] = []
        with self._lock:
            while peer in self._waiting and self._waiting[peer].bytes + size_bytes > MAX_BYTES_OF_PEER:
                excess.append(self._drop_oldest(peer))
            while self._bytes and self._bytes + size_bytes > MAX_BYTES:
                most = max(self._waiting, key=lambda other: self._waiting[other].bytes)
                excess.append(self._drop_oldest(most))
            self._waiting[peer].calls[context] = size_bytes
            self._waiting[peer].bytes += size_bytes
            self._bytes += size_bytes
        if not context.add_callback(lambda: self._forget(peer, context)):  # it has ended already
            self._forget(peer, context)
        for call in excess:
            call.cancel()

    def _drop_oldest(self, peer: str) -> grpc.ServicerContext:
        context = next(iter(self._waiting[peer].calls))
        self._drop(peer, context)
        return context

    def _forget(self, peer: str, context: grpc.ServicerContext) -> None:
        with self._lock:
            if peer in self._waiting and context in self._waiting[peer].calls:
                self._drop(peer, context)

    def _drop(self, peer: str, context: grpc.ServicerContext) -> None:
        waiting = self._waiting[peer]
        size_bytes = waiting.calls.pop(context)
        waiting.bytes -= size_bytes
        self._bytes -= size_bytes
        if not waiting.calls:
            del self._waiting[peer]


@dataclass(slots=True)
class _Waiting:
    """Of one connection."""

    calls: dict[grpc.ServicerContext, int] = field(default_factory=dict)
    """With the bytes of each, the oldest first."""
    bytes: int = 0
