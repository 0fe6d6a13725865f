"""Cancels streams whose client does not read. Such a stream would keep a thread, its data and one of MAX_STREAMS."""

import threading
import time
from collections.abc import Iterator

import grpc

from kvstore_cluster.background import BackgroundLoop

PATIENCE_S = 20.0
"""Time limit for a client to read one answer, at most 1 MiB. A slower stream is cancelled, as on the bulk port."""
_PERIOD_S = 1.0


class StalledStreams:
    """Cancels calls whose client takes longer than PATIENCE_S to read an answer, from construction until `stop`.
    Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting_since_s: dict[grpc.ServicerContext, float] = {}
        self._loop = BackgroundLoop("kvstore-rpc-stalled", self._cancel_stalled)
        self._loop.start()

    def watched(self, answers: Iterator[object], context: grpc.ServicerContext) -> Iterator[object]:
        """Yields the answers of a call, and records how long its client takes to read each."""
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

    def _cancel_stalled(self) -> None:
        if self._loop.stopping.wait(_PERIOD_S):
            return
        limit_s = time.monotonic() - PATIENCE_S
        with self._lock:
            stalled = [call for call, since_s in self._waiting_since_s.items() if since_s < limit_s]
        for call in stalled:
            call.cancel()
