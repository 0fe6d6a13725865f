"""Lets an engine that computes on the same processor go before the encoding of new chunks."""

import time
from collections.abc import Callable

from kvstore_client.planning import Links
from kvstore_client.settings import ClientSettings

_IDLE_S = 0.05
"""An engine that generates tokens pauses for a few milliseconds between its passes; this is longer."""
_LOOK_S = 0.2
"""Each look wakes a thread that takes the interpreter from the engine, and a core from one of the threads that compute:
a hundred in a second slowed an engine on two cores by several percent."""
_USABLE = 0.5
"""Share of the backlog in which chunks wait. The rest stays free: what is put meanwhile must not be dropped for want of
room that encoding at full speed would have made."""


def longest_wait_s(settings: ClientSettings) -> float:
    """How long after it was queued a chunk may still wait for the engine, in seconds."""
    return settings.timeouts.put_s / 2 if settings.store.idle_wait_s else 0.0


class GivingWay:
    """Waits for a pause of the engine, within the limits of `store_idle_wait_s`. Used by the thread that stores."""

    def __init__(self, links: Links, settings: ClientSettings) -> None:
        self._links, self._settings = links, settings

    def wait(
        self, chunks: int, queued_s: float, *, waiting_bytes: Callable[[], int], is_over: Callable[[], bool]
    ) -> None:
        """Wait before one of `chunks` that are stored together and were queued at the monotonic time `queued_s`.
        `waiting_bytes` of KV wait in all: the more, the shorter the wait. `is_over` ends it."""
        began_s, last_s = time.monotonic(), queued_s + longest_wait_s(self._settings)
        while self._links.idle_s() < _IDLE_S:
            left_s = min(last_s, began_s + self._limit_s(chunks, waiting_bytes())) - time.monotonic()
            if left_s <= 0 or is_over():
                return
            time.sleep(min(left_s, _LOOK_S))

    def _limit_s(self, chunks: int, waiting_bytes: int) -> float:
        store = self._settings.store
        free = 1 - waiting_bytes / (_USABLE * store.backlog_bytes)
        return max(0.0, free) * min(store.idle_wait_s, longest_wait_s(self._settings) / chunks)
