"""Large answers that wait in memory for their clients to take them."""

import threading

import grpc

SMALL_BYTES = 1 << 20
"""Answers up to here are not counted."""
MAX_BYTES_OF_PEER = 96 << 20
"""Of one connection: the largest answer and a half."""
MAX_BYTES = 256 << 20


class UnsentAnswers:
    """Keeps what waits within MAX_BYTES_OF_PEER and MAX_BYTES: a client that asks and does not read has its oldest
    answers cancelled. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._answers: dict[grpc.ServicerContext, tuple[str, int]] = {}  # (connection, bytes), oldest first

    @property
    def waiting_bytes(self) -> int:
        with self._lock:
            return sum(size_bytes for _, size_bytes in self._answers.values())

    def add(self, context: grpc.ServicerContext, size_bytes: int) -> None:
        """Counts an answer until its call has ended. Cancels others, oldest first, where they are too many."""
        if size_bytes <= SMALL_BYTES:
            return
        peer = context.peer()
        with self._lock:
            self._answers[context] = (peer, size_bytes)
            excess = self._excess(peer)
        if not context.add_callback(lambda: self._forget(context)):  # it has ended already
            self._forget(context)
        for call in excess:
            call.cancel()

    def _excess(self, peer: str) -> list[grpc.ServicerContext]:
        """The oldest of this connection, then of whichever has most; never the newest of all."""
        excess: list[grpc.ServicerContext] = []
        by_peer: dict[str, int] = {}
        for owner, size_bytes in self._answers.values():
            by_peer[owner] = by_peer.get(owner, 0) + size_bytes
        while by_peer[peer] > MAX_BYTES_OF_PEER or sum(by_peer.values()) > MAX_BYTES:
            owner = peer if by_peer[peer] > MAX_BYTES_OF_PEER else max(by_peer, key=by_peer.__getitem__)
            oldest = next(call for call, (whose, _) in self._answers.items() if whose == owner)
            by_peer[owner] -= self._answers.pop(oldest)[1]
            excess.append(oldest)
        return excess

    def _forget(self, context: grpc.ServicerContext) -> None:
        with self._lock:
            self._answers.pop(context, None)
