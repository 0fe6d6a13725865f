"""A queue of chunk uses that have not been reported to the eviction policies yet."""

from collections.abc import Iterable

MOST_WAITING = 1 << 16


class WaitingUses:
    """Slots in the order of their uses. Not thread-safe: used with the storage node's lock held.

    A policy takes 1 us per use, and a lookup of a thousand chunks need not wait for that. When MOST_WAITING / 2 uses
    wait, the queue keeps only the last use of each slot, which takes a thirtieth of the time. Clients that repeatedly
    look up the same chunks therefore add no work for the policies."""

    def __init__(self) -> None:
        self._slots: list[int] = []
        self._merged = 0  # length of the prefix without duplicate slots

    def add(self, slots: Iterable[int]) -> None:
        waiting = self._slots
        waiting.extend(slots)
        # The queue must double before it is merged again, so that the amortised cost of a use is constant.
        if len(waiting) > max(MOST_WAITING // 2, 2 * self._merged):
            waiting[:] = reversed(dict.fromkeys(reversed(waiting)))
            self._merged = len(waiting)

    def take(self, most: int | None = None) -> list[int]:
        """Removes and returns the oldest `most` uses, or all of them."""
        taken = self._slots[:most]
        del self._slots[:most]
        self._merged = max(0, self._merged - len(taken))
        return taken

    @property
    def excess(self) -> int:
        """Number of waiting uses above MOST_WAITING."""
        return max(0, len(self._slots) - MOST_WAITING)

    def __len__(self) -> int:
        return len(self._slots)
