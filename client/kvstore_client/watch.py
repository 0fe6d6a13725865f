"""Watchdog of reads and jobs: checks them periodically, so that silent ones can be ended."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

log = logging.getLogger(__name__)

_PERIOD_S = 0.05
"""Period of the checks, seconds. Silence limits are at least a quarter of a second."""


class Watched(Protocol):
    def check(self) -> None:
        """Called periodically, in another thread."""

    def cancel(self) -> None:
        """Called when the store closes, in another thread."""


class Watch:
    """One thread that checks all watched objects, and sleeps while there are none. Thread-safe."""

    def __init__(self, name: str) -> None:
        """`name` is that of the thread."""
        self._name = name
        self._changed = threading.Condition()
        self._watched: set[Watched] = set()
        self._stopped = False
        self._thread: threading.Thread | None = None

    def add(self, watched: Watched) -> None:
        """Watch an object until `discard`. After `stop` it is cancelled at once. Raises RuntimeError, and watches
        nothing, when this process has no thread left."""
        with self._changed:
            stopped = self._stopped
            if self._thread is None and not stopped:
                thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                thread.start()
                self._thread = thread
            self._watched.add(watched)
            self._changed.notify()
        if stopped:
            watched.cancel()

    def discard(self, watched: Watched) -> None:
        """Stop watching an object."""
        with self._changed:
            self._watched.discard(watched)

    @contextmanager
    def over(self, watched: Watched) -> Iterator[None]:
        """Watch an object inside the block."""
        self.add(watched)
        try:
            yield
        finally:
            self.discard(watched)

    def stop(self, timeout_s: float) -> None:
        """Cancel all watched objects, and end the thread."""
        with self._changed:
            self._stopped = True
            watched, thread = list(self._watched), self._thread
            self._changed.notify()
        for each in watched:
            each.cancel()
        if thread is not None:
            thread.join(timeout_s)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._watched or self._stopped)
                if self._stopped:
                    return
                self._changed.wait_for(lambda: self._stopped, _PERIOD_S)
                watched = list(self._watched)
            for each in watched:
                try:
                    each.check()
                except Exception:  # a bug in one object must not end the watch over the others
                    log.exception("a check of %s failed", self._name)
