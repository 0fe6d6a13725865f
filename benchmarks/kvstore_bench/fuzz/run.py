"""Judges mutants in worker processes. A process that dies or hangs is replaced, and the mutant that it was decoding is
reported."""

import multiprocessing
import resource
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path

import torch

from kvstore_bench.fuzz.judge import BATCH, Judgement, Verdict, check_seeds, judge_batch
from kvstore_bench.fuzz.mutants import Kind, mutant

# Memory that a worker may allocate after it has decoded every seed. An allocation of a forged size fails.
EXTRA_MEMORY_BYTES = 512 << 20
# A mutant takes a millisecond, but on a busy machine a worker of the lowest priority may get no processor for minutes.
HANG_S = 600.0
FAULTS = (Verdict.DIFFERENT, Verdict.UNSTEADY, Verdict.FOREIGN)


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
    run_seed: int,
    mutants: int,
    processes: int,
    saved: Path | None = None,
    judge: Callable[[int, int, Callable[[int], None]], list[Judgement]] = judge_batch,
) -> Iterator[Tally]:
    """Judges `mutants` mutants, rounded up to whole batches. Yields a tally of each batch. Writes the chunks of mutants
    with a fault into the folder `saved`.

    Raises AssertionError when a valid chunk no longer decodes to its KV."""
    workers = [_Worker(run_seed, batches, judge) for batches in _shares(mutants, processes)]
    try:
        while running := [worker for worker in workers if not worker.done]:
            wait([worker.results for worker in running], timeout=1.0)
            for worker in running:
                for tally in worker.progress():
                    if saved is not None:
                        _save(saved, run_seed, tally.faults)
                    yield tally
    finally:
        for worker in workers:
            worker.stop()


def _shares(mutants: int, processes: int) -> list[range]:
    """The batches of each process."""
    batches = -(-mutants // BATCH)
    return [range(first, batches, processes) for first in range(min(processes, batches))]


class _Worker:
    """A worker process, and its replacements."""

    def __init__(
        self,
        run_seed: int,
        batches: range,
        judge: Callable[[int, int, Callable[[int], None]], list[Judgement]],
    ) -> None:
        self._run_seed, self._left, self._judge = run_seed, batches, judge
        self._context = multiprocessing.get_context("spawn")
        self.done = False
        self._start()

    def progress(self) -> Iterator[Tally]:
        """Yields the tallies received since the last call. Replaces a process that died or hangs. The new process
        continues with the next batch."""
        try:
            while self.results.poll():
                tally = self.results.recv()
                if tally is None:
                    self.done = True
                    return
                self._left = self._left[1:]
                yield tally
        except EOFError:
            yield self._replaced("crash")
            return
        if self._is_hanging():
            yield self._replaced("hang")

    def stop(self) -> None:
        self._process.kill()
        self._process.join()

    def _start(self) -> None:
        self._decoding: Synchronized[int] = self._context.Value("q", -1)
        self.results, sender = self._context.Pipe(duplex=False)
        self._process: SpawnProcess = self._context.Process(
            target=_work, args=(self._run_seed, self._left, self._judge, self._decoding, sender), daemon=True
        )
        self._process.start()
        sender.close()
        self._last_seen, self._seen_at_s = -1, time.monotonic()

    def _is_hanging(self) -> bool:
        """Whether the process has been decoding the same mutant for `HANG_S`. Its start-up does not count."""
        number = self._decoding.value
        if number != self._last_seen or number < 0:
            self._last_seen, self._seen_at_s = number, time.monotonic()
        return time.monotonic() - self._seen_at_s > HANG_S

    def _replaced(self, what: str) -> Tally:
        self.stop()
        number = self._decoding.value
        if number < 0:
            raise AssertionError(
                f"a worker exited with code {self._process.exitcode} before it decoded a mutant"
            )
        found = mutant(self._run_seed, number)
        detail = f"exit code {self._process.exitcode}"
        self._left = self._left[1:]
        self.done = not self._left
        if self._left:
            self._start()
        return Tally(faults=[Fault(number, found.kind, found.seed.name, what, detail)], unjudged=BATCH)


def _work(
    run_seed: int,
    batches: range,
    judge: Callable[[int, int, Callable[[int], None]], list[Judgement]],
    decoding: "Synchronized[int]",
    results: Connection,
) -> None:
    torch.set_num_threads(1)
    check_seeds()
    start_bytes = _peak_rss_bytes()
    _limit_memory()

    def begins(number: int) -> None:
        decoding.value = number

    for batch in batches:
        tally = Tally(rss_start_bytes=start_bytes)
        tally.add(judge(run_seed, batch, begins))
        tally.rss_peak_bytes = _peak_rss_bytes()
        results.send(tally)
    results.send(None)


def _peak_rss_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _limit_memory() -> None:
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (in_use + EXTRA_MEMORY_BYTES, hard))


def _save(folder: Path, run_seed: int, faults: Sequence[Fault]) -> None:
    for fault in faults:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{run_seed}-{fault.number}.kvc").write_bytes(mutant(run_seed, fault.number).data)
