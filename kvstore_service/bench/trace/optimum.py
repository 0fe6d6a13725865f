"""What no policy can beat."""

import heapq
from collections.abc import Sequence
from itertools import chain

from kvstore_service.bench.trace.trace import Blocks


def optimal_hit_rate(requests: Sequence[Blocks], capacity_chunks: int) -> float:
    """The share of block references that hit when always the block whose next use is furthest off is evicted, which
    may be the one that has just come (Belady 1966, with bypass). Knows the future. Where a block stands for all
    before it, these are prefix hits as well."""
    references = list(chain.from_iterable(requests))
    never = len(references)
    following: dict[int, int] = {}
    next_use = [never] * len(references)
    for time in range(len(references) - 1, -1, -1):
        next_use[time] = following.get(references[time], never)
        following[references[time]] = time
    kept: dict[int, int] = {}
    furthest: list[tuple[int, int]] = []  # (-next use, block); stale unless `kept` says the same
    hits = 0
    for time, block in enumerate(references):
        hits += block in kept
        kept[block] = next_use[time]
        heapq.heappush(furthest, (-next_use[time], block))
        while len(kept) > capacity_chunks:
            use, victim = heapq.heappop(furthest)
            if kept.get(victim) == -use:
                del kept[victim]
    return hits / len(references)
