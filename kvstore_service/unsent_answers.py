"""Limits the memory of answers that clients have not read yet."""

import threading
from collections import defaultdict
from dataclasses import dataclass, field

import grpc

CALL_BYTES = 24 << 10
"""Memory of a waiting call besides its answer. Measured: 22 KiB, with 6,000 empty answers."""
MAX_BYTES_OF_PEER = 96 << 20
"""Limit per connection: 1.5 answers of the largest size, or 4,096 of the smallest."""
MAX_BYTES = 256 << 20


class UnsentAnswers:
    """Keeps unread answers and their calls within MAX_BYTES_OF_PEER and MAX_BYTES, by cancelling the oldest calls of
    clients that send requests without reading the answers. gRPC's own limit counts a call only until its answer is
    made. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: defaultdict[str, _Waiting] = defaultdict(_Waiting)  # by connection
        self._bytes = 0

    @property
    def waiting_bytes(self) -> int:
        return self._bytes

    def add(self, context: grpc.ServicerContext, answer_bytes: int) -> None:
        """Counts an answer until its call ends. If a limit is exceeded, cancels the oldest calls: first those of this
        connection, then those of the connection with the most bytes."""
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
        if not context.add_callback(lambda: self._forget(peer, context)):  # the call has already ended
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
    """Unread answers of one connection."""

    calls: dict[grpc.ServicerContext, int] = field(default_factory=dict)
    """Bytes of each call, the oldest call first."""
    bytes: int = 0
