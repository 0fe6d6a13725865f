"""Caches of the baselines: blocks of one layer, within a limit, that leave by rank."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch

BlockKey = tuple[int, int]
"""Layer and chunk."""


@dataclass(slots=True)
class BlockUse:
    """What is known of a cached block."""

    uses: int = 0
    last: int = 0
    """Number of its latest use."""
    share: float = 0.0
    """Share of its tokens that its latest use attended to."""


Rank = Callable[[BlockUse], float]
"""The block of the lowest rank leaves first."""


def lru(use: BlockUse) -> float:
    return use.last


def lfu(use: BlockUse) -> float:
    return use.uses


def frequency_times_share(use: BlockUse) -> float:
    """IMPRESS: frequency x share of important tokens."""
    return use.uses * use.share


class BlockCache:
    """Keeps blocks up to `limit_bytes`. Uses of blocks that have left are remembered."""

    def __init__(self, limit_bytes: float, rank: Rank) -> None:
        self._limit_bytes, self._rank = limit_bytes, rank
        self._blocks: dict[BlockKey, torch.Tensor] = {}
        self._uses: dict[BlockKey, BlockUse] = {}
        self._clock = itertools.count(1)
        self._size_bytes = 0
        self._heap: list[tuple[float, int, BlockKey]] = []
        """Rank and number of each use of a block; only the latest use of a block counts."""

    def get(self, key: BlockKey) -> torch.Tensor | None:
        return self._blocks.get(key)

    def used(self, key: BlockKey, block: torch.Tensor, share: float = 1.0) -> None:
        """Count a use, and keep the block."""
        use = self._uses.setdefault(key, BlockUse())
        use.uses, use.last, use.share = use.uses + 1, next(self._clock), share
        if key not in self._blocks:
            self._blocks[key] = block
            self._size_bytes += block.nbytes
        heapq.heappush(self._heap, (self._rank(use), use.last, key))
        while self._size_bytes > self._limit_bytes:
            _, number, victim = heapq.heappop(self._heap)
            if self._uses[victim].last == number:
                self._size_bytes -= self._blocks.pop(victim).nbytes
