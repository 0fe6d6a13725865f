"""Streams whose client takes no answer are ended: each keeps a thread, what it reads, and a place among the streams."""

import threading
import time
from collections.abc import Iterator

import grpc

from kvstore_cluster.background import BackgroundLoop

PATIENCE_S = 20.0
"""For one answer, 1 MiB at most, to be taken: whoever is slower is cut off, as on the bulk port."""
_LOOK_S = 1.0


class StalledStreams:
    """Cancels calls that wait longer than PATIENCE_S for their client to take an answer, from construction until
    `stop`. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting_since_s: dict[grpc.ServicerContext, float] = {}
        self._loop = BackgroundLoop("kvstore-rpc-stalled", self._look)
        self._loop.start()

    def watched(self, answers: Iterator[object], context: grpc.ServicerContext) -> Iterator[object]:
        """Passes on the answers of a call."""
        for answer in answers:
            with self._lock:
                self._waiting_since_s[context] = time.monotonic()
            try:
                yield answer
            finally:
                with self._lock:
                    del self._waiting_since_s[context]

    def stop(self) -> None:
        self._loop.stop()

    def _look(self) -> None:
        if self._loop.stopping.wait(_LOOK_S):
            return
        limit_s = time.monotonic() - PATIENCE_S
        with self._lock:
            stalled = [call for call, since_s in self._waiting_since_s.items() if since_s < limit_s]
        for call in stalled:
            call.cancel()
