"""Bounded queue between two stages."""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")


class StageQueue(Generic[Item]):
    """First in, first out, bounded by the total weight of the queued items.

    A producer blocks while the queue is full, so that a slow stage slows the stages before it. `close` announces the
    end of the items; `abort` drops queued items and wakes every blocked thread.
    """

    def __init__(self, capacity: int, producers: int = 1) -> None:
        self._capacity = capacity
        self._producers = producers
        self._weight = 0
        self._items: deque[tuple[Item, int]] = deque()
        self._changed = threading.Condition()
        self._aborted = False

    def put(self, item: Item, weight: int = 1) -> bool:
        """Append, waiting for room; an item heavier than the capacity waits for an empty queue.

        Returns False, without appending, when the queue was aborted.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: self._aborted or not self._items or self._weight + weight <= self._capacity
            )
            if self._aborted:
                return False
            self._items.append((item, weight))
            self._weight += weight
            self._changed.notify_all()
            return True

    def __iter__(self) -> Iterator[Item]:
        """Items until every producer has closed and the queue is empty, or until it is aborted."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._items or not self._producers or self._aborted)
                if self._aborted or not self._items:
                    return
                item, weight = self._items.popleft()
                self._weight -= weight
                self._changed.notify_all()
            yield item

    def next_if(self, wanted: Callable[[Item], bool]) -> Item | None:
        """The next item, if there is one already and it is wanted."""
        with self._changed:
            if self._aborted or not self._items or not wanted(self._items[0][0]):
                return None
            item, weight = self._items.popleft()
            self._weight -= weight
            self._changed.notify_all()
            return item

    def close(self) -> None:
        """Each producer calls it once, after its last item."""
        with self._changed:
            self._producers -= 1
            self._changed.notify_all()

    def abort(self) -> None:
        with self._changed:
            self._aborted = True
            self._items.clear()
            self._changed.notify_all()
