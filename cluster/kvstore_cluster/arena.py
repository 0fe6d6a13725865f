"""The memory of the DRAM tier: one anonymous mapping of fixed-size blocks, allocated as runs of blocks.

A chunk fits whenever enough blocks are free, wherever they are, so the arena needs no compaction. Freed runs are
allocated again before untouched memory, because memory that was touched before is many times faster than fresh pages.
`free_runs` keeps the runs long. Callers read and write through memoryviews; only `beginning` copies bytes.
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
# The first touch of a page runs at 1 GB/s and stops all other threads of the process: 2 MiB take 2 ms.
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
    """Allocates extents of blocks. Not thread-safe: the owner calls `allocate` and `free` with its lock held. Any
    thread may use the views of an extent as long as it is allocated.

    Raises ConfigurationError when this machine has too little memory.
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
        """Total size of the allocated blocks. Extents are rounded up to whole blocks."""
        return (self._block_count - self._free.blocks) * self._block_bytes

    def footprint_bytes(self, size_bytes: int) -> int:
        """Memory that an extent of `size_bytes` occupies: whole blocks, at least one."""
        return max(1, -(-size_bytes // self._block_bytes)) * self._block_bytes

    def allocate(self, size_bytes: int) -> Extent:
        """Allocates `size_bytes` with undefined contents. Raises ArenaFullError, and then allocates nothing."""
        needed = self.footprint_bytes(size_bytes) // self._block_bytes
        if needed > self._free.blocks:
            raise ArenaFullError(
                f"{size_bytes} bytes do not fit in memory: {self._free.blocks * self._block_bytes} of "
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
        """Frees the blocks of the extent. Its views must not be used afterwards."""
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
        """Makes the kernel provide the next 2 MiB of pages, so that no put waits for them. Keeps the contents. Returns
        False when all pages are present, or the kernel cannot provide pages ahead of time."""
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
        """Raises StorageError unless every block is either free or in one of the `allocated` extents, exactly once."""
        taken = [run for extent in allocated for run in extent.runs]
        position = 0
        self._free.check_integrity()
        for first, count in sorted([*taken, *self._free]):
            if first != position or count < 1:
                raise StorageError(
                    f"arena is corrupt: block {position} is lost or allocated twice (run at {first})"
                )
            position = first + count
        if position != self._block_count:
            raise StorageError(f"arena is corrupt: {position} of {self._block_count} blocks accounted for")


def require_memory(memory_bytes: int, block_bytes: int = DEFAULT_BLOCK_BYTES, *, nodes: int = 1) -> None:
    """Raises ConfigurationError unless an arena of `memory_bytes` has at least one block, and `nodes` such arenas fit
    the memory of this machine and of the container of this process.

    A mapping larger than the memory usually succeeds, and the kernel kills the process once the mapping fills. So it
    is refused at the start, with a message.
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
    """The memory limit of the control group (version 2, then 1). Infinite without a limit."""
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limit = Path(path).read_text(encoding="ascii").strip()
        except OSError:
            continue
        return math.inf if limit == "max" else int(limit)
    return math.inf
