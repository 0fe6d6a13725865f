"""The DRAM tier's memory: one anonymous mapping cut into fixed blocks, handed out as runs of blocks.

Blocks are all alike, so a chunk fits whenever enough of them are free, wherever they lie: there is nothing to
compact. Freed runs are handed out again before the rest of the mapping, because memory that was touched before is many
times faster than fresh pages; `free_runs` keeps them long. Bytes go in and out through memoryviews; the arena itself
never copies.
"""

import math
import mmap
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from kvstore_cluster.free_runs import FreeRuns
from kvstore_codec.errors import ArenaFullError, ConfigurationError, StorageError

DEFAULT_BLOCK_BYTES = 64 << 10
# First touch runs at 1 GB/s, during which no other thread of the process runs.
_POPULATE_BYTES = 2 << 20
_MADV_POPULATE_WRITE = 23


@dataclass(frozen=True, slots=True, eq=False)
class Extent:
    """`size_bytes` of arena memory: `runs` of (first block, blocks), and the offset at which each starts."""

    size_bytes: int
    runs: tuple[tuple[int, int], ...]
    starts: tuple[int, ...]

    @property
    def blocks(self) -> int:
        return sum(count for _, count in self.runs)


class Arena:
    """Allocates extents of blocks. Not thread-safe: the owner locks around `allocate` and `free`; the views
    may be used from any thread for as long as the extent is allocated.

    Raises ConfigurationError when this machine cannot give that much memory.
    """

    def __init__(self, memory_bytes: int, block_bytes: int = DEFAULT_BLOCK_BYTES) -> None:
        require_memory(memory_bytes, block_bytes)
        self._block_bytes = block_bytes
        self._block_count = memory_bytes // block_bytes
        try:
            mapping = mmap.mmap(-1, self._block_count * block_bytes)
        except (OSError, ValueError, OverflowError) as error:
            raise ConfigurationError(
                f"cannot map {memory_bytes} bytes for chunks ({error}); lower --memory"
            ) from error
        self._mapping = mapping
        self._memory = memoryview(mapping)
        self._populated_bytes = 0
        self._free = FreeRuns(self._block_count)

    @property
    def capacity_bytes(self) -> int:
        return self._block_count * self._block_bytes

    @property
    def used_bytes(self) -> int:
        """Bytes of the blocks that are taken: sizes rounded up to whole blocks."""
        return (self._block_count - self._free.blocks) * self._block_bytes

    def footprint_bytes(self, size_bytes: int) -> int:
        """What `size_bytes` would take: whole blocks, at least one."""
        return max(1, -(-size_bytes // self._block_bytes)) * self._block_bytes

    def allocate(self, size_bytes: int) -> Extent:
        """Takes blocks for `size_bytes`; their contents are undefined. Raises ArenaFullError, and then
        nothing was taken."""
        needed = self.footprint_bytes(size_bytes) // self._block_bytes
        if needed > self._free.blocks:
            raise ArenaFullError(
                f"{size_bytes} bytes do not fit: {self._free.blocks * self._block_bytes} of "
                f"{self.capacity_bytes} bytes are free"
            )
        runs = []
        while needed:
            run = self._free.take(needed)
            runs.append(run)
            needed -= run[1]
        lengths = (count * self._block_bytes for _, count in runs[:-1])
        return Extent(size_bytes, tuple(runs), tuple(accumulate(lengths, initial=0)))

    def free(self, extent: Extent) -> None:
        """Gives the blocks back. Nobody may use a view of the extent afterwards."""
        for first, count in extent.runs:
            self._free.give(first, count)

    def views(self, extent: Extent, offset: int = 0, length: int | None = None) -> Iterator[memoryview]:
        """Writable views that together are bytes [offset, offset + length) of the extent, in order."""
        end = extent.size_bytes if length is None else offset + length
        if not 0 <= offset <= end <= extent.size_bytes:
            raise StorageError(f"bytes [{offset}, {end}) lie outside an extent of {extent.size_bytes} bytes")
        run = max(0, bisect_right(extent.starts, offset) - 1)
        while offset < end:
            first, count = extent.runs[run]
            start = extent.starts[run]
            stop = min(start + count * self._block_bytes, end)
            begin = first * self._block_bytes - start
            yield self._memory[begin + offset : begin + stop]
            offset = stop
            run += 1

    def beginning(self, extent: Extent, length: int) -> bytes:
        """A copy of the first `length` bytes of the extent."""
        first, count = extent.runs[0]
        if length > count * self._block_bytes:
            return b"".join(self.views(extent, 0, length))
        start = first * self._block_bytes
        return bytes(self._memory[start : start + length])

    def populate(self) -> bool:
        """Has the kernel provide the next few pages now, so that no put waits for it; contents stay as they are. False
        when all are there, or the kernel cannot do it ahead of time."""
        length = min(_POPULATE_BYTES, self._block_count * self._block_bytes - self._populated_bytes)
        if length <= 0:
            return False
        try:
            self._mapping.madvise(_MADV_POPULATE_WRITE, self._populated_bytes, length)
        except OSError:  # before Linux 5.14
            return False
        self._populated_bytes += length
        return True

    def check_integrity(self, allocated: Iterable[Extent]) -> None:
        """Raises StorageError unless `allocated` and the free runs together are every block exactly once."""
        taken = [run for extent in allocated for run in extent.runs]
        position = 0
        self._free.check_integrity()
        for first, count in sorted([*taken, *self._free]):
            if first != position or count < 1:
                raise StorageError(
                    f"arena is corrupt: block {position} is lost or owned twice (run at {first})"
                )
            position = first + count
        if position != self._block_count:
            raise StorageError(f"arena is corrupt: {position} of {self._block_count} blocks accounted for")


def require_memory(memory_bytes: int, block_bytes: int = DEFAULT_BLOCK_BYTES, *, nodes: int = 1) -> None:
    """Raises ConfigurationError unless `nodes` arenas of `memory_bytes` hold something and fit this machine, or
    the container around this process.

    A mapping larger than the memory usually succeeds and gets the process killed once it fills, so it is
    refused here, where somebody can still read why.
    """
    if memory_bytes < block_bytes:
        raise ConfigurationError(
            f"a storage node needs at least {block_bytes} bytes, not {memory_bytes}; raise --memory"
        )
    limit_bytes = min(_physical_bytes(), _container_limit_bytes())
    if nodes * memory_bytes > limit_bytes:
        raise ConfigurationError(
            f"{nodes * memory_bytes} bytes of memory for chunks is more than the {limit_bytes} bytes this "
            "machine allows; lower --memory"
        )


def _physical_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _container_limit_bytes() -> float:
    """The memory limit of the control group (version 2, then 1); infinite where none is set."""
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limit = Path(path).read_text(encoding="ascii").strip()
        except OSError:
            continue
        return math.inf if limit == "max" else int(limit)
    return math.inf
