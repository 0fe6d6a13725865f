"""The least-recently-used eviction policy."""

from collections.abc import Iterator

from kvstore_cluster.eviction.base import EvictionPolicy
from kvstore_cluster.eviction.columns import Links, SlotQueue


class LeastRecentlyUsed(EvictionPolicy):
    """Evicts the least recently used chunk first. 8 bytes per chunk."""

    def __init__(self) -> None:
        self._links = Links()
        self._queue = SlotQueue(self._links)
        self._count = 0

    def add(self, slot: int, *, identity: int, size_bytes: int, cost: float) -> None:  # noqa: ARG002
        self._links.grow(slot)
        self._queue.push(slot)
        self._count += 1

    def touch(self, slot: int) -> None:
        self._queue.remove(slot)
        self._queue.push(slot)

    def follow(self, slot: int, before: int) -> None:
        self._queue.remove(slot)
        self._queue.insert_before(slot, before)

    def postpone(self, slot: int) -> None:
        self.touch(slot)

    def remove(self, slot: int, *, evicted: bool) -> None:  # noqa: ARG002
        self._queue.remove(slot)
        self._count -= 1

    def victims(self) -> Iterator[int]:
        return iter(self._queue)

    def __len__(self) -> int:
        return self._count
