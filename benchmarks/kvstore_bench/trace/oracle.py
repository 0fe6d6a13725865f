"""Hit rate of an ideal cache that keeps the beginnings of texts."""

import heapq
from collections.abc import Sequence

from kvstore_bench.trace.trace import Blocks

_ROOT = -1


class BeginningsOracle:
    """One cache with a radix tree of whole prompts. It evicts the least recently used leaf, so that a block is never
    evicted before the blocks after it. A prompt that does not fit keeps its beginning: it never evicts its own blocks.
    The hash of a block covers all blocks before it, as in the traces."""

    def __init__(self, capacity_chunks: int) -> None:
        self._capacity = capacity_chunks
        self._used: dict[int, int] = {}  # block -> time of its last use
        self._parent: dict[int, int] = {}
        self._followers: dict[int, int] = {_ROOT: 0}
        self._leaves: list[
            tuple[int, int, int]
        ] = []  # (last use, -depth, block); stale if it differs from `_used`
        self._time = 0

    def ask(self, request: Blocks) -> int:
        """Processes a prompt, and returns the number of blocks at its beginning that were cached."""
        self._time += 1
        run = next((n for n, block in enumerate(request) if block not in self._used), len(request))
        for depth, block in enumerate(request[:run]):
            self._used[block] = self._time
            self._offer(block, depth)
        parent = request[run - 1] if run else _ROOT
        for depth, block in enumerate(request[run:], run):
            if block in self._used or (len(self._used) == self._capacity and not self._evict()):
                break
            self._used[block], self._parent[block], self._followers[block] = self._time, parent, 0
            self._followers[parent] += 1
            self._offer(block, depth)
            parent = block
        return run

    def _offer(self, block: int, depth: int) -> None:
        if not self._followers[block]:
            heapq.heappush(self._leaves, (self._used[block], -depth, block))

    def _evict(self) -> bool:
        """Evicts the least recently used leaf. Returns False if all leaves belong to the current prompt."""
        while self._leaves:
            last_use, depth, leaf = self._leaves[0]
            if last_use == self._time:
                return False
            heapq.heappop(self._leaves)
            if self._used.get(leaf) != last_use or self._followers[leaf]:
                continue
            del self._used[leaf], self._followers[leaf]
            parent = self._parent.pop(leaf)
            self._followers[parent] -= 1
            if parent != _ROOT:
                self._offer(parent, -depth - 1)
            return True
        return False


def beginnings_hit_rate(requests: Sequence[Blocks], capacity_chunks: int) -> float:
    """The share of block references that hit in this cache and have an unbroken prefix of hits."""
    oracle = BeginningsOracle(capacity_chunks)
    return sum(map(oracle.ask, requests)) / sum(map(len, requests))
