"""A trace through an eviction policy."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

from kvstore_bench.trace.trace import Blocks
from kvstore_cluster.eviction import EvictionPolicy

# All blocks are alike: the trace says nothing of what they cost, and KV of as many tokens is as large.
_BLOCK_BYTES = 1 << 20
_BLOCK_COST = 512.0
_REPORT_EVERY = 1000


@dataclass(frozen=True, slots=True)
class HitRate:
    """Shares of all block references."""

    blocks: float
    """The block was there."""
    prefix: float
    """It was, and so were all before it in its prompt: what a worker can use without recomputing in between."""


def replay(
    requests: Sequence[Blocks],
    policy: EvictionPolicy,
    capacity_chunks: int,
    identities: Mapping[int, int],
    advance: Callable[[int], None] = lambda _: None,
) -> HitRate:
    """Every prompt is looked up, what is found is touched last block first, as a storage node does, and what is missing
    is put in the order of the prompt, each evicting what the policy likes least. `identities`: 64 bits of each
    block; `advance` is told of prompts done, now and then."""
    slots: dict[int, int] = {}
    blocks = [0] * capacity_chunks
    hits = prefix_hits = references = 0
    for number, request in enumerate(requests, 1):
        found = [slots[block] for block in request if block in slots]
        missing = [block for block in request if block not in slots]
        references += len(request)
        hits += len(found)
        prefix_hits += len(found) if not missing else sum(1 for _ in takewhile(slots.__contains__, request))
        for slot in reversed(found):
            policy.touch(slot)
        for block in missing:
            if len(slots) < capacity_chunks:
                slot = len(slots)
            else:
                slot = next(policy.victims())
                policy.remove(slot, evicted=True)
                del slots[blocks[slot]]
            slots[block] = slot
            blocks[slot] = block
            policy.add(slot, identity=identities[block], size_bytes=_BLOCK_BYTES, cost=_BLOCK_COST)
        if number % _REPORT_EVERY == 0:
            advance(_REPORT_EVERY)
    advance(len(requests) % _REPORT_EVERY)
    return HitRate(hits / references, prefix_hits / references)
