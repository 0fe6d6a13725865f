"""Deliver stage: which layers and chunks are there, which never will be, and when to stop waiting."""

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from kvstore_client.fetch.base import ReadTask
from kvstore_client.timeline import Timeline
from kvstore_codec.encoding import Encoding


@dataclass(frozen=True, slots=True)
class FetchReport:
    """How a fetch ended."""

    chunks: int
    delivered: int
    """Leading chunks that are complete in every layer: what may be reused as a prefix."""
    missing: Mapping[int, str] = field(default_factory=dict)
    """Chunk index -> reason."""
    received_bytes: int = 0
    encodings: frozenset[Encoding] = frozenset()
    """What the chunks were stored as."""

    @property
    def complete(self) -> bool:
        return self.delivered == self.chunks


class Delivery:
    """The state of one fetch, shared by its stages and by the engine that waits for layers. Thread-safe.

    A fetch ends when everything was delivered, when everything that is not yet delivered is known to be missing,
    at its deadline, when nothing arrived for `stall_s`, or by `end`.
    """

    def __init__(
        self, tasks: Iterable[ReadTask], *, layers: int, deadline_s: float, stall_s: float, timeline: Timeline
    ) -> None:
        self.timeline = timeline
        self._deadline = time.monotonic() + deadline_s
        self._stall_s = stall_s
        self._last_progress = time.monotonic()
        self._changed = threading.Condition()
        self._open_by_layer = [0] * layers
        self._open_by_chunk: dict[int, int] = {}
        for task in tasks:
            self._open_by_chunk[task.chunk_index] = self._open_by_chunk.get(task.chunk_index, 0) + 1
            for layer in range(task.layers.start, task.layers.stop):
                self._open_by_layer[layer] += 1
        self._missing: dict[int, str] = {}
        self._received_bytes = 0
        self._ended = False
        self._end_callbacks: list[Callable[[], object]] = []

    # ---- called by the stages

    def remaining_s(self) -> float:
        return max(0.0, self._deadline - time.monotonic())

    @property
    def is_over(self) -> bool:
        with self._changed:
            return self._ended

    def progress(self, received_bytes: int) -> None:
        with self._changed:
            self._received_bytes += received_bytes
            self._last_progress = time.monotonic()

    def moved(self, at_s: float) -> None:
        """Bytes came at this time, of a piece that is not complete."""
        with self._changed:
            self._last_progress = max(self._last_progress, at_s)

    def deliver(self, task: ReadTask) -> None:
        with self._changed:
            self._last_progress = time.monotonic()
            self._open_by_chunk[task.chunk_index] -= 1
            for layer in range(task.layers.start, task.layers.stop):
                self._open_by_layer[layer] -= 1
            self._changed.notify_all()

    def fail_chunks(self, tasks: Iterable[ReadTask], reason: str) -> None:
        """These tasks will not be delivered, so their chunks are missing; the first reason is kept."""
        with self._changed:
            for task in tasks:
                if not self._ended:
                    self._missing.setdefault(task.chunk_index, reason)
            self._changed.notify_all()

    def on_end(self, callback: Callable[[], object]) -> None:
        """Call `callback` when the fetch ends, at once if it has."""
        with self._changed:
            if not self._ended:
                self._end_callbacks.append(callback)
                return
        callback()

    # ---- called by the engine

    def wait_layer(self, layer: int) -> bool:
        """Wait until a layer is there for all chunks. False as soon as any chunk is known to be missing."""
        with self._changed:
            self._wait_for(lambda: self._open_by_layer[layer] == 0 or bool(self._missing))
            return self._open_by_layer[layer] == 0 and not self._missing

    def wait(self) -> None:
        """Wait until nothing more will come."""
        with self._changed:
            self._wait_for(lambda: all(i in self._missing or not n for i, n in self._open_by_chunk.items()))

    def end(self, reason: str) -> None:
        """Give up what is still open, for `reason`, and stop the stages."""
        with self._changed:
            if self._ended:
                return
            self._give_up(reason)
            self._ended = True
            callbacks, self._end_callbacks = self._end_callbacks, []
            self._changed.notify_all()
        for callback in callbacks:
            callback()

    def report(self) -> FetchReport:
        with self._changed:
            chunks = len(self._open_by_chunk)
            delivered = 0
            while (
                delivered < chunks and not self._open_by_chunk[delivered] and delivered not in self._missing
            ):
                delivered += 1
            return FetchReport(chunks, delivered, dict(self._missing), self._received_bytes)

    # ---- with the lock held

    def _wait_for(self, condition: Callable[[], bool]) -> None:
        while not (condition() or self._ended):
            now = time.monotonic()
            patience_s = min(self._deadline, self._last_progress + self._stall_s) - now
            if patience_s <= 0:
                self._give_up("timeout" if now >= self._deadline else "stalled")
                return
            self._changed.wait(patience_s)

    def _give_up(self, reason: str) -> None:
        for index, open_tasks in self._open_by_chunk.items():
            if open_tasks:
                self._missing.setdefault(index, reason)
        self._changed.notify_all()
