"""What no policy can beat."""

import heapq
from collections.abc import Sequence

from kvstore_bench.trace.trace import Blocks


def optimal_hit_rate(requests: Sequence[Blocks], capacity_chunks: int) -> float:
    """The share of block references that hit when after every prompt those blocks are kept whose next prompt is
    nearest, of all that were there and its own (Belady 1966, with bypass, a prompt at a time). Knows the future. Where
    a block stands for all before it, so that its prefix is wanted no later, they are prefix hits as well."""
    never = len(requests)
    following: dict[int, int] = {}
    next_uses: list[list[int]] = []
    for time in range(len(requests) - 1, -1, -1):
        next_uses.append([following.get(block, never) for block in requests[time]])
        following.update(dict.fromkeys(requests[time], time))
    kept: dict[int, int] = {}
    furthest: list[tuple[int, int]] = []  # (-next use, block); stale unless `kept` says the same
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
