"""A read of frames in progress: its results, its cancellation and its end."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from kvstore_client.fetch.base import ReadTask
from kvstore_client.miss_reason import MissReason


@dataclass(frozen=True, slots=True)
class FrameResult:
    """How one range of a read ended: with its frames, or without them."""

    index: int
    """Index of the range in the read."""
    task: ReadTask
    data: memoryview | None
    """The frames, each verified against its checksum. None: the range is missing."""
    missing: MissReason | None = None
    """Why the range is missing."""


class FrameRead:
    """A read of ranges of frames. Never raises, and every range completes by the deadline.

    Ranges complete in any order, each once: delivered or missing. One thread takes the results, by iteration or by
    `take`; `cancel` may be called from any thread.
    """

    def __init__(self, tasks: Sequence[ReadTask], timeout_s: float, traceparent: str = "") -> None:
        self.tasks = tuple(tasks)
        self.traceparent = traceparent
        """The trace that it belongs to. Empty: none."""
        self._deadline_s = time.monotonic() + timeout_s
        self._changed = threading.Condition()
        self._open = set(range(len(self.tasks)))
        self._arriving: set[int] = set()
        self._results: deque[FrameResult] = deque()
        self._cancelled: list[int] = []

    def __iter__(self) -> Iterator[FrameResult]:
        """All results that were not taken yet, in the order of completion. Blocks until the last range is complete."""
        while results := self.take():
            yield from results

    def take(self, timeout_s: float | None = None) -> list[FrameResult]:
        """The results since the last call. Waits for one, for at most `timeout_s` (0: not at all; None: until the
        deadline). Empty when nothing completed in that time, or when every result was taken."""
        with self._changed:
            self._changed.wait_for(lambda: self._results or not self._open, timeout_s)
            results = list(self._results)
            self._results.clear()
            return results

    def cancel(self, indices: Iterable[int] | None = None) -> None:
        """Stop reading these ranges, or all. A range that is not arriving at this moment is missing at once
        (`CANCELLED`); one that is may still be delivered. Ranges that are complete keep their result. The node does not
        read what was cancelled, unless it has begun to; other ranges and other reads continue."""
        with self._changed:
            wanted = self._open if indices is None else self._open.intersection(indices)
            for index in sorted(wanted - self._arriving):
                self._cancelled.append(index)
                self._complete(index, missing=MissReason.CANCELLED)

    @property
    def is_complete(self) -> bool:
        """Whether every range is delivered or missing. Results may still be waiting to be taken."""
        with self._changed:
            return not self._open

    @property
    def left_s(self) -> float:
        """Seconds until the deadline."""
        return max(0.0, self._deadline_s - time.monotonic())

    # ---- for the threads that receive

    def cancelled(self, since: int) -> list[int]:
        """Cancelled ranges, without the first `since` of them: each receiver counts those that it has heard of."""
        with self._changed:
            return self._cancelled[since:]

    def begin(self, index: int) -> bool:
        """Announce the bytes of a range. False when it is complete already: its bytes are to be discarded. A range that
        has begun must be delivered or failed, and cannot be cancelled until then."""
        with self._changed:
            if index not in self._open:
                return False
            self._arriving.add(index)
            return True

    def put_back(self, indices: Iterable[int]) -> list[int]:
        """Those of the ranges that are not complete, which may be read again or cancelled."""
        with self._changed:
            left = [index for index in indices if index in self._open]
            self._arriving.difference_update(left)
            return left

    def deliver(self, index: int, data: memoryview) -> None:
        """Complete a range with its verified frames. Ignored when it is complete already."""
        with self._changed:
            self._complete(index, data=data)

    def fail(self, indices: Iterable[int], reason: MissReason) -> None:
        """Complete these ranges as missing. Those that are complete already stay as they are."""
        with self._changed:
            for index in indices:
                self._complete(index, missing=reason)

    def _complete(
        self, index: int, *, data: memoryview | None = None, missing: MissReason | None = None
    ) -> None:
        """Complete a range. Lock held."""
        if index in self._open:
            self._open.discard(index)
            self._arriving.discard(index)
            self._results.append(FrameResult(index, self.tasks[index], data, missing))
            self._changed.notify_all()
