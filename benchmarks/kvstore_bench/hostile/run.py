"""Judges mutants of one parser in worker processes."""

import functools
import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch

from kvstore_bench.fuzz.worker import Begins, Death, Task, Worker, results_of, shares
from kvstore_bench.hostile.memory import PeakMemory
from kvstore_bench.hostile.parser import (
    MEMORY,
    READ,
    SLOW,
    honest_memory_bytes,
    limit_bytes,
    outcome_of,
    random_of,
)
from kvstore_bench.hostile.table import PARSERS

BATCH = 100
HANG_S = 120.0
_DEATHS = ("crash", "hang")


class Fault(NamedTuple):
    """A mutant that revealed a fault. `what` is the name of an error, MEMORY, SLOW, "crash" or "hang"."""

    number: int
    what: str
    detail: str


@dataclass(slots=True)
class Tally:
    """What a parser did with mutants."""

    outcomes: Counter[str] = field(default_factory=Counter)
    """Of mutants that it read or refused as it documents, by Outcome.what."""
    faults: list[Fault] = field(default_factory=list)
    slowest_s: float = 0.0
    """Of one mutant, in seconds of a processor."""
    honest_bytes: int = 0
    """Memory for the largest honest input."""
    most_bytes: int = 0
    """Memory for the mutant that took most."""

    @property
    def mutants(self) -> int:
        return self.outcomes.total() + len(self.faults)

    def merge(self, other: "Tally") -> None:
        self.outcomes += other.outcomes
        self.faults += other.faults
        self.slowest_s = max(self.slowest_s, other.slowest_s)
        self.honest_bytes = max(self.honest_bytes, other.honest_bytes)
        self.most_bytes = max(self.most_bytes, other.most_bytes)

    def row(self, parser: str) -> dict[str, Any]:
        """The row of results."""
        faults = Counter(fault.what for fault in self.faults)
        refused = {what: count for what, count in sorted(self.outcomes.items()) if what != READ}
        return {
            "parser": parser,
            "mutants": self.mutants,
            "read": self.outcomes[READ],
            "refused": sum(refused.values()),
            "foreign_exceptions": faults.total() - sum(faults[what] for what in (*_DEATHS, MEMORY, SLOW)),
            "crashes": faults["crash"],
            "hangs": faults["hang"] + faults[SLOW],
            "too_much_memory": faults[MEMORY],
            "slowest_ms": round(self.slowest_s * 1e3, 1),
            "honest_bytes": self.honest_bytes,
            "most_bytes": self.most_bytes,
            "refusals": refused,
        }


def judged(name: str, run_seed: int, numbers: range, processes: int) -> Iterator[Tally]:
    """Judges the mutants of these numbers, in whole batches. Yields a tally of each batch. A process that dies or hangs
    is replaced, and the rest of its batch is not judged."""
    task = Task(functools.partial(_prepare, name), functools.partial(_judge, run_seed))
    batches = range(numbers.start // BATCH, -(-numbers.stop // BATCH))
    workers = [Worker(task, share, HANG_S) for share in shares(batches, processes)]
    results = results_of(workers)
    with closing(results):
        for result in results:
            yield (
                Tally(faults=[Fault(result.number, result.what, result.detail)])
                if isinstance(result, Death)
                else result
            )


class _Prepared(NamedTuple):
    name: str
    memory: PeakMemory
    honest_bytes: int


def _prepare(name: str) -> _Prepared:
    """Reads honest input, and measures its memory."""
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)  # readers of unusable files log why
    memory = PeakMemory()
    return _Prepared(name, memory, honest_memory_bytes(PARSERS[name], memory))


def _judge(run_seed: int, given: object, batch: int, begins: Begins) -> Tally:
    prepared = cast("_Prepared", given)
    parser, most_bytes = PARSERS[prepared.name], limit_bytes(prepared.honest_bytes)
    tally = Tally(honest_bytes=prepared.honest_bytes)
    for number in range(batch * BATCH, (batch + 1) * BATCH):
        begins(number)
        data = parser.mutant(random_of(run_seed, parser.name, number))
        found = outcome_of(parser, data, prepared.memory, most_bytes)
        if found.what == MEMORY:
            # Pages that the kernel had taken away are counted when it gives them back. What a parser takes, it takes
            # every time.
            found = outcome_of(parser, data, prepared.memory, most_bytes)
        if found.is_fault:
            tally.faults.append(Fault(number, found.what, found.detail))
        else:
            tally.outcomes[found.what] += 1
        tally.slowest_s = max(tally.slowest_s, found.cpu_seconds)
        tally.most_bytes = max(tally.most_bytes, found.memory_bytes)
    return tally
