"""The blocks that the cluster stores, by tenant: on which nodes, and in which tiers."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from kvstore_cluster.events.base import IN_MEMORY, ON_DISK

MOST_NODES = 1024
_BITS = 2  # of each node
_EVERY_MEMORY = sum(IN_MEMORY << _BITS * node for node in range(MOST_NODES))
_EVERY_DISK = sum(ON_DISK << _BITS * node for node in range(MOST_NODES))


@dataclass(slots=True)
class TierEvents:
    """Blocks that became, or are no longer, stored in a tier of the cluster: their prefix ids."""

    stored_in_memory: list[bytes] = field(default_factory=list)
    stored_on_disk: list[bytes] = field(default_factory=list)
    removed_from_memory: list[bytes] = field(default_factory=list)
    removed_from_disk: list[bytes] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(
            self.stored_in_memory or self.stored_on_disk or self.removed_from_memory or self.removed_from_disk
        )


class BlockIndex:
    """Blocks of one tenant. A block is in a tier of the cluster if it is in that tier of some node. About 120 bytes per
    block. Not thread-safe. `node` is a number below MOST_NODES."""

    def __init__(self) -> None:
        self._nodes: dict[bytes, int] = {}  # by prefix id: the tiers of all nodes

    def __len__(self) -> int:
        return len(self._nodes)

    def update(self, node: int, tiers: Mapping[bytes, int]) -> TierEvents:
        """Replaces what is known of blocks on a node by `tiers`, and returns what changed in the cluster."""
        events, shift = TierEvents(), _BITS * node
        for block, now in tiers.items():
            before = self._nodes.get(block, 0)
            after = before & ~((IN_MEMORY | ON_DISK) << shift) | now << shift
            self._change(block, before, after, events)
        return events

    def drop_node(self, node: int) -> Iterator[TierEvents]:
        """Forgets all blocks of a node. Yields what changed in the cluster, in parts of a few thousand blocks."""
        own = (IN_MEMORY | ON_DISK) << _BITS * node
        blocks = [block for block, nodes in self._nodes.items() if nodes & own]
        for begin in range(0, len(blocks), 4096):
            yield self.update(node, dict.fromkeys(blocks[begin : begin + 4096], 0))

    def blocks(self) -> tuple[list[bytes], list[int]]:
        """A copy for `stored`: all blocks, and of each the tiers of all nodes. Two lists, because a million pairs take
        five times as long."""
        return list(self._nodes), list(self._nodes.values())

    def _change(self, block: bytes, before: int, after: int, events: TierEvents) -> None:
        if before == after:
            return
        if after:
            self._nodes[block] = after
        else:
            del self._nodes[block]
        was, is_now = _tiers_of(before), _tiers_of(after)
        if (was ^ is_now) & IN_MEMORY:
            (events.stored_in_memory if is_now & IN_MEMORY else events.removed_from_memory).append(block)
        if (was ^ is_now) & ON_DISK:
            (events.stored_on_disk if is_now & ON_DISK else events.removed_from_disk).append(block)


@lru_cache(maxsize=1 << 16)  # few combinations of nodes have the same block
def _tiers_of(nodes: int) -> int:
    """Tiers of the cluster that have a block, by those of all nodes."""
    return IN_MEMORY * bool(nodes & _EVERY_MEMORY) + ON_DISK * bool(nodes & _EVERY_DISK)


def stored(blocks: Sequence[bytes], nodes_of: Sequence[int]) -> TierEvents:
    """The events that tell all of `BlockIndex.blocks`, or of a part of them."""
    events = TierEvents()
    for block, nodes in zip(blocks, nodes_of, strict=True):
        tiers = _tiers_of(nodes)
        if tiers & IN_MEMORY:
            events.stored_in_memory.append(block)
        if tiers & ON_DISK:
            events.stored_on_disk.append(block)
    return events
