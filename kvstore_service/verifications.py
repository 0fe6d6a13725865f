"""Which verifications of a node run."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from kvstore_codec.errors import BusyError

MAX_VERIFICATIONS = 16
Step = TypeVar("Step")


class Verifications:
    """At most one of each tenant, and MAX_VERIFICATIONS in all. They take turns, so that the node is as busy as with
    one. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[str | None] = set()
        self._turn = threading.Lock()

    @contextmanager
    def admitted(self, tenant: str | None) -> Iterator[None]:
        """Admits a verification of a tenant, or of every tenant, for the duration of the block. Raises BusyError."""
        with self._lock:
            if tenant in self._running:
                raise BusyError("this node is already being verified; wait until that has ended")
            if len(self._running) >= MAX_VERIFICATIONS:
                raise BusyError(f"{MAX_VERIFICATIONS} verifications are already running; try again later")
            self._running.add(tenant)
        try:
            yield
        finally:
            with self._lock:
                self._running.discard(tenant)

    def in_turns(self, steps: Iterator[Step]) -> Iterator[Step]:
        """The steps of a verification. While one is made, others wait; while the caller uses it, they go on."""
        end = object()
        while True:
            with self._turn:
                step = next(steps, end)
            if step is end:
                return
            yield step  # type: ignore[misc]
