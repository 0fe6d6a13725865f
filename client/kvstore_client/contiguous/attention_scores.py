"""How much attention each frame has received so far: the value of a frame to a cache."""

from __future__ import annotations

from collections import OrderedDict

from kvstore_client.contiguous.grid import FrameKey

MAX_FRAMES = 65_536
"""Frames whose scores are remembered, cached or not; about 20 MB. The frame that was used longest ago is forgotten."""


class AttentionScores:
    """Accumulated attention x number of loads of each frame (ContiguousKV, section on attention-guided caching). Not
    thread-safe."""

    def __init__(self, limit: int = MAX_FRAMES) -> None:
        self._limit = limit
        self._seen: OrderedDict[FrameKey, tuple[float, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._seen)

    def used(self, key: FrameKey, attention: float) -> float:
        """Count a use of the frame by a question that paid it this share of its attention, 0 to 1. Returns the frame's
        score."""
        total, loads = self._seen.pop(key, (0.0, 0))
        self._seen[key] = total + max(0.0, attention), loads + 1
        if len(self._seen) > self._limit:
            self._seen.popitem(last=False)
        return self.of(key)

    def of(self, key: FrameKey) -> float:
        """The frame's score; 0 for a frame that was never used."""
        total, loads = self._seen.get(key, (0.0, 0))
        return total * loads
