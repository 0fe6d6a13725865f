"""Cancels calls whose client neither reads nor sends. Such a stream would keep a thread, its data and one of
MAX_STREAMS."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import grpc

from kvstore_cluster.background import BackgroundLoop

PATIENCE_S = 20.0
"""Time limit for a client to read one answer, at most 1 MiB. A slower stream is cancelled, as on the bulk port."""
SILENT_S = 60.0
"""Time limit for a client to send the next message of a stream."""
_PERIOD_S = 1.0
Message = TypeVar("Message")


class StalledStreams:
    """Cancels calls whose client takes longer than PATIENCE_S to read an answer, or too long to send a message, from
    construction until `stop`. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # For whom a call waits, and since when or until when. A call has one thread, so it waits for one at a time.
        self._unread_since_s: dict[grpc.ServicerContext, float] = {}
        self._silent_until_s: dict[grpc.ServicerContext, float] = {}
        self._loop = BackgroundLoop("kvstore-rpc-stalled", self._cancel_stalled, period_s=_PERIOD_S)
        self._loop.start()

    def watched(self, answers: Iterator[object], context: grpc.ServicerContext) -> Iterator[object]:
        """Yields the answers of a call, and records how long its client takes to read each."""
        for answer in answers:
            with self._lock:
                self._unread_since_s[context] = time.monotonic()
            try:
                yield answer
            finally:
                with self._lock:
                    del self._unread_since_s[context]

    def received(self, messages: Iterator[Message], context: grpc.ServicerContext) -> "Received[Message]":
        """The messages of a call's client. Records how long each takes to come."""
        return Received(self, messages, context)

    @contextmanager
    def waiting_for_message(self, context: grpc.ServicerContext, limit_s: float) -> Iterator[None]:
        """Cancels the call if the block, which waits for a message of its client, takes longer than `limit_s`."""
        with self._lock:
            self._silent_until_s[context] = time.monotonic() + limit_s
        try:
            yield
        finally:
            with self._lock:
                del self._silent_until_s[context]

    def stop(self) -> None:
        self._loop.stop()

    def _cancel_stalled(self) -> None:
        now_s = time.monotonic()
        unread_s = now_s - PATIENCE_S
        with self._lock:
            stalled = [call for call, since_s in self._unread_since_s.items() if since_s < unread_s]
            stalled += [call for call, until_s in self._silent_until_s.items() if until_s < now_s]
        for call in stalled:
            call.cancel()


class Received(Iterator[Message]):
    """Messages of a client. Not a generator, which would keep a message of up to 8 MiB while it waits for the next."""

    def __init__(
        self, stalled: StalledStreams, messages: Iterator[Message], context: grpc.ServicerContext
    ) -> None:
        self._stalled, self._messages, self._context = stalled, messages, context

    def __next__(self) -> Message:
        with self._stalled.waiting_for_message(self._context, SILENT_S):
            return next(self._messages)
