"""S3-FIFO (Yang et al., SOSP 2023, algorithm 1), in bytes."""

from array import array
from collections.abc import Iterator

from kvstore_cluster.eviction.base import EvictionPolicy
from kvstore_cluster.eviction.columns import NO_SLOT, Links, SlotQueue, grow
from kvstore_cluster.eviction.ghosts import GhostTable

_SMALL_SHARE = 0.1
_MOST_USES = 3
_USES_TO_STAY = 2
_IN_MAIN = 4  # the bit above the count of uses


class S3Fifo(EvictionPolicy):
    """The S3-FIFO eviction policy. About 34 bytes per chunk.

    A new chunk enters a small queue, which holds a tenth of the bytes. A chunk that is used twice there moves to the
    main queue. A chunk at the end of the main queue is reinserted once for every use since its last round, at most
    three times. An evicted chunk that is stored again enters the main queue directly, if no more bytes were evicted
    from the small queue in between than the main queue holds.
    """

    def __init__(self) -> None:
        self._links = Links()
        self._small = SlotQueue(self._links)
        self._main = SlotQueue(self._links)
        self._states = array("B")
        self._sizes = array("I")
        self._identities = array("Q")
        self._ghosts = GhostTable()
        self._small_bytes = 0
        self._total_bytes = 0
        self._forgone_bytes = 0  # total bytes ever evicted from the small queue: the clock of the ghost table
        self._count = 0

    def add(self, slot: int, *, identity: int, size_bytes: int, cost: float) -> None:  # noqa: ARG002
        self._links.grow(slot)
        for column in (self._states, self._sizes, self._identities):
            grow(column, slot)
        self._ghosts.reserve(len(self._states))
        self._sizes[slot] = size_bytes
        self._identities[slot] = identity
        self._count += 1
        self._total_bytes += size_bytes
        ghost = self._ghosts.take(identity)
        if ghost is not None and self._forgone_bytes - ghost[0] <= (1 - _SMALL_SHARE) * self._total_bytes:
            self._enter_main(slot)
        else:
            self._states[slot] = 0
            self._small.push(slot)
            self._small_bytes += size_bytes

    def touch(self, slot: int) -> None:
        if self._states[slot] & _MOST_USES < _MOST_USES:
            self._states[slot] += 1

    def follow(self, slot: int, before: int) -> None:
        if self._states[slot] & _IN_MAIN == self._states[before] & _IN_MAIN:
            queue = self._queue(slot)
            queue.remove(slot)
            queue.insert_before(slot, before)

    def postpone(self, slot: int) -> None:
        queue = self._queue(slot)
        queue.remove(slot)
        queue.push(slot)

    def remove(self, slot: int, *, evicted: bool) -> None:
        size_bytes = self._sizes[slot]
        self._count -= 1
        self._total_bytes -= size_bytes
        if self._states[slot] & _IN_MAIN:
            self._main.remove(slot)
            return
        self._leave_small(slot)
        if evicted:
            self._forgone_bytes += size_bytes
            self._ghosts.put(self._identities[slot], self._forgone_bytes, 0)

    def victims(self) -> Iterator[int]:
        # The next candidate in each queue. Older slots have been proposed already.
        small, main = self._small.oldest, self._main.oldest
        small_bytes, total_bytes = self._small_bytes, self._total_bytes
        newer = self._links.newer
        while small != NO_SLOT or main != NO_SLOT:
            if small != NO_SLOT and (small_bytes >= _SMALL_SHARE * total_bytes or main == NO_SLOT):
                slot, small = small, newer[small]
                small_bytes -= self._sizes[slot]
                if self._states[slot] >= _USES_TO_STAY:
                    self._leave_small(slot)
                    self._enter_main(slot)
                    main = slot if main == NO_SLOT else main
                    continue
            else:
                slot, main = main, newer[main]
                if self._states[slot] & _MOST_USES:
                    self._main.remove(slot)
                    self._main.push(slot)
                    self._states[slot] -= 1
                    main = slot if main == NO_SLOT else main
                    continue
            total_bytes -= self._sizes[slot]
            yield slot

    def __len__(self) -> int:
        return self._count

    def _queue(self, slot: int) -> SlotQueue:
        return self._main if self._states[slot] & _IN_MAIN else self._small

    def _enter_main(self, slot: int) -> None:
        self._states[slot] = _IN_MAIN
        self._main.push(slot)

    def _leave_small(self, slot: int) -> None:
        self._small.remove(slot)
        self._small_bytes -= self._sizes[slot]
