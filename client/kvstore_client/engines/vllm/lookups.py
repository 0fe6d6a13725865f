"""Looks in the store on behalf of a scheduler that must not wait."""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from kvstore_client.match import Match
from kvstore_client.planning.leading import Offer
from kvstore_client.request_id import in_request
from kvstore_codec.identity import ChunkId


@dataclass(frozen=True, slots=True)
class Found:
    """What a lookup has found."""

    match: Match
    offer: Offer
    """The match, as a planner reads it."""


Peek = Callable[[Sequence[ChunkId]], Found]
"""Finds the longest stored prefix of a text. May wait for the network; leases nothing."""

_THREADS = 2
_MOST_WAITING = 256
"""Lookups beyond this are not made: their requests are computed."""


@dataclass(frozen=True, slots=True)
class Lookup:
    """A lookup that was begun."""

    begun_s: float
    """On the clock of `time.monotonic`."""
    found: "Future[Found]"

    @property
    def result(self) -> Found | None:
        """None while nothing is known, and where the lookup failed or was dropped."""
        if not self.found.done() or self.found.cancelled() or self.found.exception() is not None:
            return None
        return self.found.result()

    @property
    def match(self) -> Match | None:
        """The match in `result`."""
        return self.result.match if self.result is not None else None

    def is_open(self, limit_s: float) -> bool:
        """Whether an answer may still come within `limit_s` of its beginning."""
        return not self.found.done() and time.monotonic() < self.begun_s + limit_s

    def drop(self) -> None:
        """Nobody wants the answer any more."""
        self.found.cancel()


class Lookups:
    """Runs lookups in the background. Thread-safe; no method waits but `close`."""

    def __init__(self, peek: Peek) -> None:
        self._peek = peek
        self._threads = ThreadPoolExecutor(_THREADS, "kvstore-peek")
        self._lock = threading.Lock()
        self._waiting = 0

    def begin(self, chunk_ids: Sequence[ChunkId]) -> Lookup | None:
        """Start looking for these chunks. None when too many lookups wait already, or after `close`."""
        with self._lock:
            if self._waiting >= _MOST_WAITING:
                return None
            self._waiting += 1
        try:
            found = self._threads.submit(in_request(self._peek), tuple(chunk_ids))
        except RuntimeError:  # closed, or no thread left in this process
            self._ended()
            return None
        found.add_done_callback(self._ended)
        return Lookup(time.monotonic(), found)

    def close(self) -> None:
        """Drop what has not begun, and wait for what has: a lookup's timeout at most."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _ended(self, _: object = None) -> None:
        with self._lock:
            self._waiting -= 1
