"""Judges mutants of chunks in worker processes. A process that dies or hangs is replaced, and the mutant that it was
decoding is reported."""

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch

from kvstore_bench.fuzz.judge import BATCH, Judgement, Verdict, check_seeds, judge_batch
from kvstore_bench.fuzz.mutants import Kind, mutant
from kvstore_bench.fuzz.worker import Begins, Death, Task, Worker, peak_rss_bytes, results_of, shares

FAULTS = (Verdict.DIFFERENT, Verdict.UNSTEADY, Verdict.FOREIGN)
Judge = Callable[[int, int, Begins], list[Judgement]]


@dataclass(frozen=True, slots=True)
class Fault:
    """A mutant that revealed a fault of the decoder. `what` is a verdict, "crash" or "hang"."""

    number: int
    kind: Kind
    encoding: str
    what: str
    detail: str


@dataclass(slots=True)
class Tally:
    """Counts of judged mutants. `verdicts` counts by (encoding, kind, verdict)."""

    verdicts: Counter[tuple[str, Kind, Verdict]] = field(default_factory=Counter)
    faults: list[Fault] = field(default_factory=list)
    slowest_s: float = 0.0
    rss_start_bytes: int = 0
    """Memory of a worker after it has decoded every seed."""
    rss_peak_bytes: int = 0
    unjudged: int = 0
    """Number of mutants in batches during which a worker died or hung."""

    @property
    def mutants(self) -> int:
        return self.verdicts.total()

    def count(self, what: str) -> int:
        return sum(fault.what == what for fault in self.faults)

    def add(self, judgements: Sequence[Judgement]) -> None:
        for judgement in judgements:
            found = judgement.mutant
            self.verdicts[found.seed.name, found.kind, judgement.verdict] += 1
            self.slowest_s = max(self.slowest_s, judgement.slowest_s)
            if judgement.verdict in FAULTS:
                self.faults.append(
                    Fault(found.number, found.kind, found.seed.name, judgement.verdict, judgement.detail)
                )

    def merge(self, other: "Tally") -> None:
        self.verdicts += other.verdicts
        self.faults += other.faults
        self.slowest_s = max(self.slowest_s, other.slowest_s)
        self.rss_start_bytes = max(self.rss_start_bytes, other.rss_start_bytes)
        self.rss_peak_bytes = max(self.rss_peak_bytes, other.rss_peak_bytes)
        self.unjudged += other.unjudged


def fuzz(
    run_seed: int, mutants: int, processes: int, saved: Path | None = None, judge: Judge = judge_batch
) -> Iterator[Tally]:
    """Judges `mutants` mutants, rounded up to whole batches. Yields a tally of each batch. Writes the chunks of mutants
    with a fault into the folder `saved`.

    Raises AssertionError when a valid chunk no longer decodes to its KV."""
    task = Task(functools.partial(_prepare, run_seed), functools.partial(_judge, judge))
    workers = [Worker(task, batches) for batches in shares(range(-(-mutants // BATCH)), processes)]
    results = results_of(workers)
    with closing(results):
        for result in results:
            tally = _of_death(run_seed, result) if isinstance(result, Death) else result
            if saved is not None:
                _save(saved, run_seed, tally.faults)
            yield tally


def _prepare(run_seed: int) -> tuple[int, int]:
    """Decodes every seed. Returns the run's seed and the memory of the process."""
    torch.set_num_threads(1)
    check_seeds()
    return run_seed, peak_rss_bytes()


def _judge(judge: Judge, prepared: object, batch: int, begins: Begins) -> Tally:
    run_seed, start_bytes = cast("tuple[int, int]", prepared)
    tally = Tally(rss_start_bytes=start_bytes)
    tally.add(judge(run_seed, batch, begins))
    tally.rss_peak_bytes = peak_rss_bytes()
    return tally


def _of_death(run_seed: int, death: Death) -> Tally:
    found = mutant(run_seed, death.number)
    fault = Fault(death.number, found.kind, found.seed.name, death.what, death.detail)
    return Tally(faults=[fault], unjudged=BATCH)


def _save(folder: Path, run_seed: int, faults: Sequence[Fault]) -> None:
    for fault in faults:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{run_seed}-{fault.number}.kvc").write_bytes(mutant(run_seed, fault.number).data)
