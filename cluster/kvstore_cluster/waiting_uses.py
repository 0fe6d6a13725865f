"""Uses of chunks that the eviction policies have not been told yet."""

from collections.abc import Iterable

MOST_WAITING = 1 << 16


class WaitingUses:
    """Slots in the order of their uses. A policy takes a microsecond for a use, and a lookup of a thousand chunks need
    not wait for that. Where half of MOST_WAITING wait, the uses of one chunk become its last one, which takes a
    thirtieth of that: clients that look the same chunks up again and again pay nothing for the policies. Used under the
    storage node's lock."""

    def __init__(self) -> None:
        self._slots: list[int] = []
        self._merged = 0  # so many at the beginning are of as many chunks

    def add(self, slots: Iterable[int]) -> None:
        waiting = self._slots
        waiting.extend(slots)
        # After a merger as many again must come before the next one, so that each use costs the same.
        if len(waiting) > max(MOST_WAITING // 2, 2 * self._merged):
            waiting[:] = reversed(dict.fromkeys(reversed(waiting)))
            self._merged = len(waiting)

    def take(self, most: int | None = None) -> list[int]:
        """The oldest `most` uses, which wait no longer."""
        taken = self._slots[:most]
        del self._slots[:most]
        self._merged = max(0, self._merged - len(taken))
        return taken

    @property
    def excess(self) -> int:
        """How many more wait than may."""
        return max(0, len(self._slots) - MOST_WAITING)

    def __len__(self) -> int:
        return len(self._slots)
