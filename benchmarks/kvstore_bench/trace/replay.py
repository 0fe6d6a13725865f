"""Replays a trace through an eviction policy."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

from kvstore_bench.trace.trace import Blocks
from kvstore_cluster.eviction import EvictionPolicy

# All blocks have the same size and cost: the trace does not give costs, and blocks have equally many tokens.
_BLOCK_BYTES = 1 << 20
_BLOCK_COST = 512.0
_REPORT_EVERY = 1000


@dataclass(frozen=True, slots=True)
class HitRate:
    """Hit rates, as shares of all block references."""

    blocks: float
    """The block was cached."""
    prefix: float
    """The block and all blocks before it in its prompt were cached, so a worker can use it without recomputing any."""


def replay(
    requests: Sequence[Blocks],
    policy: EvictionPolicy,
    capacity_chunks: int,
    identities: Mapping[int, int],
    advance: Callable[[int], None] = lambda _: None,
) -> HitRate:
    """Replays prompts through an eviction policy. Each prompt is looked up. Found blocks are touched from last to
    first, as a storage node does. Missing blocks are put in order, and each evicts what the policy chooses.
    `identities` gives 64 bits for each block. `advance` is called now and then with the number of finished prompts."""
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
