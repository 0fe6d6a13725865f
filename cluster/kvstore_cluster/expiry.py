"""A queue that finds expired chunks without examining the others."""

from array import array
from collections import OrderedDict
from collections.abc import Iterator
from itertools import chain

from kvstore_cluster.eviction.columns import grow


class ExpiryQueue:
    """Slots with an expiry time, soonest first: a binary heap that knows the position of each slot, so that a slot can
    be removed before it expires. Each operation takes logarithmic time. 8 bytes per slot. Not thread-safe."""

    def __init__(self, times: "array[float]") -> None:
        """`times` holds the expiry time of each slot, which must not change while the slot is in the queue."""
        self._times = times
        self._heap = array("i")
        self._places = array("i")  # position in the heap, by slot
        self._overdue: OrderedDict[int, None] = OrderedDict()

    def add(self, slot: int) -> None:
        grow(self._places, slot)
        self._heap.append(slot)
        self._places[slot] = len(self._heap) - 1
        self._rise(slot)

    def remove(self, slot: int) -> None:
        """Removes a slot, which must be in the queue."""
        if slot in self._overdue:
            del self._overdue[slot]
        else:
            self._take(slot)

    def due(self, now_s: float, most: int) -> list[int]:
        """Returns up to `most` slots that expired by `now_s`, slots that were not returned before first. Slots that the
        caller does not remove are returned again later, after the others."""
        due: list[int] = []
        while len(due) < most and self.has_due(now_s):
            due.append(self._heap[0])
            self._take(self._heap[0])
        again = range(min(most - len(due), len(self._overdue)))
        due += [self._overdue.popitem(last=False)[0] for _ in again]
        self._overdue.update(dict.fromkeys(due))
        return due

    def has_due(self, now_s: float) -> bool:
        """Whether a slot expired by `now_s` that `due` has not returned yet."""
        return bool(self._heap) and self._times[self._heap[0]] <= now_s

    def __iter__(self) -> Iterator[int]:
        """Iterates over all slots, in no particular order."""
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
