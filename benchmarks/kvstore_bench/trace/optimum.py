"""An upper bound of the hit rate of every eviction policy."""

import heapq
from collections.abc import Sequence

from kvstore_bench.trace.trace import Blocks


def optimal_hit_rate(requests: Sequence[Blocks], capacity_chunks: int) -> float:
    """The hit rate, as a share of block references, of the optimal policy that knows the future (Belady 1966, with
    bypass, one prompt at a time). After every prompt it keeps those cached and new blocks whose next use is nearest. If
    the hash of a block covers all blocks before it, its prefix is used no later, so all hits are prefix hits."""
    never = len(requests)
    following: dict[int, int] = {}
    next_uses: list[list[int]] = []
    for time in range(len(requests) - 1, -1, -1):
        next_uses.append([following.get(block, never) for block in requests[time]])
        following.update(dict.fromkeys(requests[time], time))
    kept: dict[int, int] = {}
    furthest: list[tuple[int, int]] = []  # (-next use, block); stale if it differs from `kept`
    hits = 0
    for request, uses in zip(requests, reversed(next_uses), strict=True):
        hits += sum(block in kept for block in request)
        for block, use in zip(request, uses, strict=True):
            kept[block] = use
            heapq.heappush(furthest, (-use, block))
        while len(kept) > capacity_chunks:
            use, victim = heapq.heappop(furthest)
            if kept.get(victim) == -use:
                del kept[victim]
    return hits / sum(map(len, requests))
