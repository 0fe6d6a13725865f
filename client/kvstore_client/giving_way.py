"""Lets an engine that computes on the same processor go before the encoding of new chunks."""

import time
from collections.abc import Callable

from kvstore_client.planning import Links
from kvstore_client.settings import ClientSettings

_IDLE_S = 0.05
"""An engine that generates tokens pauses for a few milliseconds between its passes; this is longer."""
_POLL_S = 0.01


class GivingWay:
    """Waits for a pause of the engine, within the limits of `store_idle_wait_s`. Used by the thread that stores."""

    def __init__(self, links: Links, settings: ClientSettings) -> None:
        self._links, self._settings = links, settings

    def wait(self, chunks: int, waiting_bytes: int, *, is_over: Callable[[], bool]) -> None:
        """Wait before one of `chunks` that are stored together, while `waiting_bytes` of KV wait in all. `is_over` ends
        it."""
        until_s = time.monotonic() + self._limit_s(chunks, waiting_bytes)
        while time.monotonic() < until_s and self._links.idle_s() < _IDLE_S and not is_over():
            time.sleep(_POLL_S)

    def _limit_s(self, chunks: int, waiting_bytes: int) -> float:
        store, timeouts = self._settings.store, self._settings.timeouts
        free = 1 - waiting_bytes / store.backlog_bytes
        return max(0.0, free) * min(store.idle_wait_s, timeouts.put_s / 2 / chunks)
