"""Aborts a fetch that would take longer than computing everything."""

import threading
import time

from kvstore_client.fetch import Fetch

_LOOK_S = 0.05
_LEAST_S, _LEAST_SHARE = 0.1, 0.1
"""Least time that any fetch gets, in seconds and as a share of the prefill: the first bytes say little about a link."""


class FetchWatchdog:
    """Checks the progress of `fetch`, which expects `size_bytes`, until nobody would wait for it any more. Cancels the
    fetch when at its current speed it would take longer than `prefill_s`; its caller prefills then."""

    def __init__(self, fetch: Fetch, size_bytes: int, prefill_s: float) -> None:
        self._fetch, self._size_bytes, self._prefill_s = fetch, size_bytes, prefill_s
        self._began_s = time.monotonic()
        self._ready = threading.Event()
        fetch.on_ready(self._ready.set)

    def start(self) -> None:
        """Start watching. Raises nothing: when no thread can be started, the fetch still has its own deadline."""
        try:
            threading.Thread(target=self._watch, name="kvstore-patience", daemon=True).start()
        except RuntimeError:
            return

    def _watch(self) -> None:
        least_s = max(_LEAST_S, _LEAST_SHARE * self._prefill_s)
        while not self._ready.wait(_LOOK_S):
            elapsed_s = time.monotonic() - self._began_s
            expected_s = elapsed_s * self._size_bytes / max(1, self._fetch.received_bytes)
            if elapsed_s > least_s and expected_s > self._prefill_s:
                self._fetch.cancel()
