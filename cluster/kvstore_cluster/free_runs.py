"""The free blocks of an arena, kept as the longest possible runs."""

from bisect import bisect_left, insort
from collections.abc import Iterator

from kvstore_codec.errors import StorageError


class FreeRuns:
    """Runs of free blocks. Adjacent runs are always joined. Not thread-safe.

    `take` uses the shortest run that is long enough (best fit). `benchmarks/arena_fragmentation.py` compares it with
    the first run that is long enough (first fit): with best fit, chunks of mixed sizes occupy fewer runs, and there is
    no search by address. `take` and `give` take constant time, except for the sorted list of lengths: N blocks have
    runs of at most sqrt(2 N) different lengths.
    """

    def __init__(self, blocks: int) -> None:
        self.blocks = 0
        self._count_at: dict[int, int] = {}
        self._first_before: dict[int, int] = {}  # first block of a run, by the block after the run
        self._by_count: dict[int, dict[int, None]] = {}
        self._counts: list[int] = []  # keys of `_by_count`, sorted
        self.give(0, blocks)

    def take(self, blocks: int) -> tuple[int, int]:
        """Takes a run of `blocks` blocks, or the longest run when none is that long. Returns its first block and its
        length. At least one block must be free."""
        place = min(bisect_left(self._counts, blocks), len(self._counts) - 1)
        first = next(
            reversed(self._by_count[self._counts[place]])
        )  # the run freed last: its memory may still be cached
        count = self._remove(first)
        if count > blocks:
            self._add(first + blocks, count - blocks)
        return first, min(blocks, count)

    def give(self, first: int, count: int) -> None:
        """Frees the run."""
        before, behind = self._first_before.get(first), first + count
        if behind in self._count_at:
            count += self._remove(behind)
        if before is not None:
            count += self._remove(before)
            first = before
        self._add(first, count)

    def check_integrity(self) -> None:
        """Raises StorageError when two runs are adjacent, or the tables of runs disagree."""
        ends = {first + count: first for first, count in self}
        by_count = {(first, count) for count, firsts in self._by_count.items() for first in firsts}
        if (
            ends != self._first_before
            or by_count != set(self)
            or self._counts != sorted(self._by_count)
            or ends.keys() & self._count_at.keys()
            or sum(self._count_at.values()) != self.blocks
        ):
            raise StorageError(f"arena is corrupt: the tables of its {len(ends)} free runs disagree")

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """All runs as (first block, blocks), in no particular order."""
        return iter(self._count_at.items())

    def _add(self, first: int, count: int) -> None:
        self._count_at[first] = count
        self._first_before[first + count] = first
        if count not in self._by_count:
            self._by_count[count] = {}
            insort(self._counts, count)
        self._by_count[count][first] = None
        self.blocks += count

    def _remove(self, first: int) -> int:
        """Removes the run, and returns its length in blocks."""
        count = self._count_at.pop(first)
        del self._first_before[first + count]
        firsts = self._by_count[count]
        del firsts[first]
        if not firsts:
            del self._by_count[count]
            del self._counts[bisect_left(self._counts, count)]
        self.blocks -= count
        return count
