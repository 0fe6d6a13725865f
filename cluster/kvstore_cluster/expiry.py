"""Which chunks' time is over, without a look at the others."""

from array import array
from collections import OrderedDict
from collections.abc import Iterator
from itertools import chain

from kvstore_cluster.eviction.columns import grow


class ExpiryQueue:
    """The slots that end at some time, soonest first: a binary heap that knows where each slot is in it, so that one
    that leaves early leaves nothing behind. Each operation takes a time that grows with the logarithm of their number;
    8 bytes a slot. Not thread-safe."""

    def __init__(self, times: "array[float]") -> None:
        """`times` has for each slot when it ends, which does not change while the slot is in here."""
        self._times = times
        self._heap = array("i")
        self._places = array("i")  # by slot
        self._overdue: OrderedDict[int, None] = OrderedDict()

    def add(self, slot: int) -> None:
        grow(self._places, slot)
        self._heap.append(slot)
        self._places[slot] = len(self._heap) - 1
        self._rise(slot)

    def remove(self, slot: int) -> None:
        """A slot that was added and not removed since."""
        if slot in self._overdue:
            del self._overdue[slot]
        else:
            self._take(slot)

    def due(self, now_s: float, most: int) -> list[int]:
        """Up to `most` slots whose time is over, those that never were returned before first. What the caller does not
        remove is returned again, after the others."""
        due: list[int] = []
        while len(due) < most and self.has_due(now_s):
            due.append(self._heap[0])
            self._take(self._heap[0])
        again = range(min(most - len(due), len(self._overdue)))
        due += [self._overdue.popitem(last=False)[0] for _ in again]
        self._overdue.update(dict.fromkeys(due))
        return due

    def has_due(self, now_s: float) -> bool:
        """Whether a slot's time is over that `due` has not returned yet."""
        return bool(self._heap) and self._times[self._heap[0]] <= now_s

    def __iter__(self) -> Iterator[int]:
        """Every slot, in no order."""
        return chain(self._heap, self._overdue)

    def _take(self, slot: int) -> None:
        place, last = self._places[slot], self._heap.pop()
        if last != slot:
            self._heap[place], self._places[last] = last, place
            self._rise(last)
            self._sink(last)

    def _rise(self, slot: int) -> None:
        heap, places, times = self._heap, self._places, self._times
        place = places[slot]
        while place:
            above = heap[(place - 1) // 2]
            if times[above] <= times[slot]:
                break
            heap[place], places[above] = above, place
            place = (place - 1) // 2
        heap[place], places[slot] = slot, place

    def _sink(self, slot: int) -> None:
        heap, places, times = self._heap, self._places, self._times
        place = places[slot]
        while (below := 2 * place + 1) < len(heap):
            if below + 1 < len(heap) and times[heap[below + 1]] < times[heap[below]]:
                below += 1
            if times[slot] <= times[heap[below]]:
                break
            heap[place], places[heap[below]] = heap[below], place
            place = below
        heap[place], places[slot] = slot, place
