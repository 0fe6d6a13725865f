"""One level of the frame cache: decoded frames in one kind of memory, up to a limit of bytes."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator

import torch

from kvstore_client.contiguous.grid import FrameKey
from kvstore_codec.errors import StorageError

_STALE_PER_FRAME = 2
"""The heap is rebuilt when it holds more outdated entries than this per cached frame."""


class CacheLevel:
    """Keeps the frames of the highest priority, in a min-heap. Not thread-safe."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._frames: dict[FrameKey, tuple[torch.Tensor, float]] = {}
        self._heap: list[tuple[float, int, FrameKey]] = []
        """Priority, order of entry, frame. An entry is outdated when the frame has another priority or has left."""
        self._order = itertools.count()
        self.size_bytes = 0

    def __len__(self) -> int:
        return len(self._frames)

    def __contains__(self, key: FrameKey) -> bool:
        return key in self._frames

    def __iter__(self) -> Iterator[FrameKey]:
        return iter(self._frames)

    def get(self, key: FrameKey) -> torch.Tensor | None:
        found = self._frames.get(key)
        return None if found is None else found[0]

    def put(
        self, key: FrameKey, frame: torch.Tensor, priority: float
    ) -> list[tuple[FrameKey, torch.Tensor, float]]:
        """Keep a frame. Returns the frames that leave for it, the lowest priority first: possibly the frame itself."""
        self.pop(key)
        self._frames[key] = frame, priority
        self.size_bytes += frame.nbytes
        self._push(key, priority)
        left: list[tuple[FrameKey, torch.Tensor, float]] = []
        while self.size_bytes > self.limit_bytes:
            lowest, _, victim = heapq.heappop(self._heap)
            kept = self._frames.get(victim)
            if kept is not None and kept[1] == lowest:
                left.append((victim, kept[0], lowest))
                self.pop(victim)
        return left

    def reprioritise(self, key: FrameKey, priority: float) -> None:
        """Change the priority of a frame, if it is here."""
        found = self._frames.get(key)
        if found is None or found[1] == priority:
            return
        self._frames[key] = found[0], priority
        self._push(key, priority)

    def pop(self, key: FrameKey) -> torch.Tensor | None:
        found = self._frames.pop(key, None)
        if found is None:
            return None
        self.size_bytes -= found[0].nbytes
        self._trim()
        return found[0]

    def check_integrity(self) -> None:
        """Raises StorageError when sizes or the heap contradict the frames."""
        found_bytes = sum(frame.nbytes for frame, _ in self._frames.values())
        if self.size_bytes != found_bytes or found_bytes > self.limit_bytes:
            raise StorageError(
                f"{found_bytes} bytes of frames are counted as {self.size_bytes}, of {self.limit_bytes} allowed"
            )
        current = {(priority, key) for priority, _, key in self._heap}
        lost = [key.frame for key, (_, at) in self._frames.items() if (at, key) not in current]
        if lost or len(self._heap) > self._most_entries:
            raise StorageError(f"frames {lost[:8]} are not in the heap, which has {len(self._heap)} entries")

    @property
    def _most_entries(self) -> int:
        return 1 + (1 + _STALE_PER_FRAME) * len(self._frames)

    def _push(self, key: FrameKey, priority: float) -> None:
        heapq.heappush(self._heap, (priority, next(self._order), key))
        self._trim()

    def _trim(self) -> None:
        """Drop outdated entries when they are too many."""
        if len(self._heap) > self._most_entries:
            self._heap = [(at, next(self._order), name) for name, (_, at) in self._frames.items()]
            heapq.heapify(self._heap)
