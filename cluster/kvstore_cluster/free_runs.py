"""The free blocks of an arena, as runs that are as long as they can be."""

from bisect import bisect_left, insort
from collections.abc import Iterator

from kvstore_codec.errors import StorageError


class FreeRuns:
    """Runs of free blocks, of which no two touch: what is given back is joined with its neighbours. Not thread-safe.

    A run is taken from the shortest one that is long enough (best fit). Measured in `benchmarks/arena_fragmentation.py`
    against the first one that is long enough (first fit): chunks of mixed sizes lie in fewer pieces, and nothing has to
    be searched by address. Taking and giving take the same time however many runs there are, but for the list of
    lengths: N blocks have runs of at most sqrt(2 N) different lengths.
    """

    def __init__(self, blocks: int) -> None:
        self.blocks = 0
        self._count_at: dict[int, int] = {}
        self._first_before: dict[int, int] = {}  # by the block behind the run
        self._by_count: dict[int, dict[int, None]] = {}
        self._counts: list[int] = []  # keys of `_by_count`, in order
        self.give(0, blocks)

    def take(self, blocks: int) -> tuple[int, int]:
        """(first block, blocks) of a run that is free no longer: of so many blocks, or of fewer where no free run is
        that long, and then the longest. The caller knows that a block is free."""
        place = min(bisect_left(self._counts, blocks), len(self._counts) - 1)
        first = next(
            reversed(self._by_count[self._counts[place]])
        )  # the latest: its memory may be cached still
        count = self._remove(first)
        if count > blocks:
            self._add(first + blocks, count - blocks)
        return first, min(blocks, count)

    def give(self, first: int, count: int) -> None:
        """The run is free from now on."""
        before, behind = self._first_before.get(first), first + count
        if behind in self._count_at:
            count += self._remove(behind)
        if before is not None:
            count += self._remove(before)
            first = before
        self._add(first, count)

    def check_integrity(self) -> None:
        """Raises StorageError when runs touch, or the books about them differ."""
        ends = {first + count: first for first, count in self}
        by_count = {(first, count) for count, firsts in self._by_count.items() for first in firsts}
        if (
            ends != self._first_before
            or by_count != set(self)
            or self._counts != sorted(self._by_count)
            or ends.keys() & self._count_at.keys()
            or sum(self._count_at.values()) != self.blocks
        ):
            raise StorageError(f"arena is corrupt: the books about {len(ends)} free runs differ")

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Every run, in no order."""
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
        """How many blocks the run had."""
        count = self._count_at.pop(first)
        del self._first_before[first + count]
        firsts = self._by_count[count]
        del firsts[first]
        if not firsts:
            del self._by_count[count]
            del self._counts[bisect_left(self._counts, count)]
        self.blocks -= count
        return count
