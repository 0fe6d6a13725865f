"""Measure fragmentation of the arena: pieces and copy rates of a 4 MiB chunk after many puts and evictions.

python benchmarks/arena_fragmentation.py [--before COMMIT] [--memory-mib 1024] [--operations 20000] [--output FILE]

Puts chunks of 0.5 to 8 MiB, and evicts random chunks to make room. Measures full arenas, as on a node without a disk,
and arenas of which a twentieth is free, as on a node with a disk. Compares the present arena (best fit), one that takes
the lowest run that is long enough (first fit), and with `--before` the arena of that commit. They are measured
alternately."""

import argparse
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from kvstore_bench.results import write_results
from kvstore_cluster import arena as current
from kvstore_cluster.arena import Arena, Extent
from kvstore_cluster.free_runs import FreeRuns

CHUNK_BYTES = 4 << 20
_SMALLEST_BYTES, _LARGEST_BYTES = 512 << 10, 8 << 20
_ROUNDS = 31
_COPIES = 8


class FirstFit(FreeRuns):
    """Allocates from the run with the lowest address that is long enough."""

    def take(self, blocks: int) -> tuple[int, int]:
        """Takes up to `blocks` neighbouring blocks. Returns the first and their number."""
        runs = sorted(self)
        first, count = next((run for run in runs if run[1] >= blocks), max(runs, key=lambda run: run[1]))
        self._remove(first)
        if count > blocks:
            self._add(first + blocks, count - blocks)
        return first, min(blocks, count)


class Workload:
    """A random sequence of puts and evictions in one arena. It is the same for every arena."""

    def __init__(self, arena: Arena, free_bytes: int) -> None:
        self.arena = arena
        self._free_bytes = free_bytes
        self._choose = random.Random(7)
        self._held: list[Extent] = []

    def allocate(self, size_bytes: int) -> Extent:
        """Allocates a chunk. Evicts random chunks first if they are in the way."""
        wanted = self.arena.footprint_bytes(size_bytes) + self._free_bytes
        while self.arena.capacity_bytes - self.arena.used_bytes < wanted:
            place = self._choose.randrange(len(self._held))
            self._held[place], self._held[-1] = self._held[-1], self._held[place]
            self.arena.free(self._held.pop())
        extent = self.arena.allocate(size_bytes)
        self._held.append(extent)
        return extent

    def operate(self) -> float:
        """Makes a put of a random size, with its evictions. Returns microseconds."""
        size_bytes = self._choose.randint(_SMALLEST_BYTES, _LARGEST_BYTES)
        begin = time.perf_counter()
        self.allocate(size_bytes)
        return 1e6 * (time.perf_counter() - begin)

    def copy(self, source: memoryview, target: memoryview) -> tuple[float, float, int]:
        """Puts and gets a chunk of 4 MiB. Returns the seconds of the put, the seconds of the get, and the number of
        pieces."""
        begin = time.perf_counter()
        extent = self.allocate(CHUNK_BYTES)
        position = 0
        for view in self.arena.views(extent):
            view[:] = source[position : position + view.nbytes]
            position += view.nbytes
        between = time.perf_counter()
        position = 0
        for view in self.arena.views(extent):
            target[position : position + view.nbytes] = view
            position += view.nbytes
        return between - begin, time.perf_counter() - between, len(extent.runs)


def timed(workload: Workload, source: memoryview, target: memoryview) -> dict[str, float]:
    """Best copy rates of `_COPIES` chunks of 4 MiB, and their mean number of pieces."""
    puts, gets, pieces = zip(*(workload.copy(source, target) for _ in range(_COPIES)), strict=True)
    return {
        "put_GBps": CHUNK_BYTES / min(puts) / 1e9,
        "get_GBps": CHUNK_BYTES / min(gets) / 1e9,
        "pieces": statistics.mean(pieces),
    }


def measure(arenas: dict[str, Arena], free_share: float, operations: int) -> list[dict[str, float | str]]:
    """Measures all arenas, empty and after `operations` puts. `free_share` of each stays free."""
    workloads = {
        name: Workload(arena, int(free_share * arena.capacity_bytes)) for name, arena in arenas.items()
    }
    source, target = memoryview(random.randbytes(CHUNK_BYTES)), memoryview(bytearray(CHUNK_BYTES))
    rows: list[dict[str, float | str]] = []
    for operations_before in (0, operations):
        allocating: dict[str, list[float]] = {name: [0.0] for name in workloads}
        for _ in range(operations_before):
            for name, workload in workloads.items():
                allocating[name].append(workload.operate())
        rounds: dict[str, list[dict[str, float]]] = {name: [] for name in workloads}
        for _ in range(_ROUNDS):
            for name, workload in workloads.items():
                rounds[name].append(timed(workload, source, target))
        for name, results in rounds.items():
            figures = {key: round(statistics.median(row[key] for row in results), 2) for key in results[0]}
            allocate_us = round(statistics.mean(allocating[name]), 1)
            rows.append(
                {"arena": name, "free_share": free_share, "operations_before": operations_before}
                | figures
                | {"allocate_us": allocate_us}
            )
            print(rows[-1], flush=True)
    return rows


def arena_of(commit: str) -> Callable[[int], Arena]:
    """The class `Arena` of a commit."""
    shown = ["git", "show", f"{commit}:cluster/kvstore_cluster/arena.py"]
    source = subprocess.run(shown, check=True, capture_output=True, text=True).stdout
    module = ModuleType("arena_before")
    sys.modules[module.__name__] = module  # a dataclass looks up its module
    exec(compile(source, "arena.py", "exec"), module.__dict__)  # noqa: S102 (code of this repository)
    made: Callable[[int], Arena] = module.Arena
    return made


def first_fit(memory_bytes: int) -> Arena:
    arena = current.Arena(memory_bytes)
    arena._free = FirstFit(memory_bytes // current.DEFAULT_BLOCK_BYTES)
    return arena


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--before", metavar="COMMIT", help="also measure the arena of this commit")
    parser.add_argument("--memory-mib", type=int, default=1024, help="size of each arena")
    parser.add_argument("--operations", type=int, default=20_000, help="number of puts")
    parser.add_argument("--output", type=Path, help="write the result to this file")
    options = parser.parse_args()
    kinds: dict[str, Callable[[int], Arena]] = {"best fit": current.Arena, "first fit": first_fit}
    if options.before:
        kinds["before"] = arena_of(options.before)
    rows = []
    for free_share in (0.0, 0.05):
        arenas = {name: make(options.memory_mib << 20) for name, make in kinds.items()}
        for arena in arenas.values():
            while arena.populate():
                pass
        rows += measure(arenas, free_share, options.operations)
    write_results(rows, options.output, {"memory_mib": options.memory_mib, "chunk_bytes": CHUNK_BYTES})


if __name__ == "__main__":
    main()
