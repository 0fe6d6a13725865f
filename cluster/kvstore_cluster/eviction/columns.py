"""Queues of slots without an object per slot."""

from array import array
from collections.abc import Iterator

NO_SLOT = -1


def grow(column: "array[int]", slot: int) -> None:
    """Extends the column with zeros until `slot` is a valid index."""
    if slot >= len(column):
        column.frombytes(bytes(column.itemsize * (slot + 1 - len(column))))


class Links:
    """Links of each slot to its neighbours in its queue. 8 bytes per slot, shared by all queues."""

    __slots__ = ("newer", "older")

    def __init__(self) -> None:
        self.older = array("i")
        self.newer = array("i")

    def grow(self, slot: int) -> None:
        grow(self.older, slot)
        grow(self.newer, slot)


class SlotQueue:
    """A FIFO queue of slots that also inserts and removes in the middle, in constant time. A slot is in at most one of
    the queues that share one `Links`."""

    __slots__ = ("_links", "_newest", "oldest")

    def __init__(self, links: Links) -> None:
        self._links = links
        self.oldest = NO_SLOT
        self._newest = NO_SLOT

    def push(self, slot: int) -> None:
        links, newest = self._links, self._newest
        links.older[slot] = newest
        links.newer[slot] = NO_SLOT
        if newest == NO_SLOT:
            self.oldest = slot
        else:
            links.newer[newest] = slot
        self._newest = slot

    def insert_before(self, slot: int, newer: int) -> None:
        """Inserts `slot` so that it leaves just before `newer`, which must be in the queue."""
        links = self._links
        older = links.older[newer]
        links.older[slot], links.newer[slot] = older, newer
        links.older[newer] = slot
        if older == NO_SLOT:
            self.oldest = slot
        else:
            links.newer[older] = slot

    def remove(self, slot: int) -> None:
        links = self._links
        older, newer = links.older[slot], links.newer[slot]
        if older == NO_SLOT:
            self.oldest = newer
        else:
            links.newer[older] = newer
        if newer == NO_SLOT:
            self._newest = older
        else:
            links.older[newer] = older

    def __iter__(self) -> Iterator[int]:
        """Iterates over the slots, oldest first. The queue must not change during the iteration."""
        slot = self.oldest
        while slot != NO_SLOT:
            yield slot
            slot = self._links.newer[slot]
