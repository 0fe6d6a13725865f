"""Worker processes that decode hostile input, and are replaced when they die or hang."""

import multiprocessing
import resource
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Generic, TypeVar

# Memory that a worker may allocate beyond what it has after its preparation. An allocation of a forged size fails.
EXTRA_MEMORY_BYTES = 512 << 20
# An input takes a millisecond, but on a busy machine a worker of the lowest priority may get no processor for minutes.
HANG_S = 600.0

Result = TypeVar("Result")
Begins = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Death:
    """A worker that died or hung while it decoded input `number`. `what` is "crash" or "hang"."""

    number: int
    what: str
    detail: str


@dataclass(frozen=True)
class Task(Generic[Result]):
    """What a worker does, in functions that the new process can import. `prepare` runs first; what it returns is passed
    to `judge` with the number of a batch and a function to call with the number of an input before it is decoded."""

    prepare: Callable[[], object]
    judge: Callable[[object, int, Begins], Result]


class Worker(Generic[Result]):
    """A process that judges batches of input, and its replacements."""

    def __init__(self, task: Task[Result], batches: range, hang_s: float | None = None) -> None:
        """`hang_s` is the time for one input, by default HANG_S."""
        self._task, self._left, self._hang_s = task, batches, hang_s
        self._context = multiprocessing.get_context("spawn")
        self.done = not batches
        if batches:
            self._start()

    def progress(self) -> Iterator[Result | Death]:
        """Yields the results received since the last call. Replaces a process that died or hangs. The new process
        continues with the next batch."""
        try:
            while self.results.poll():
                result = self.results.recv()
                if result is None:
                    self.done = True
                    return
                self._left = self._left[1:]
                yield result
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
            target=_work, args=(self._task, self._left, self._decoding, sender), daemon=True
        )
        self._process.start()
        sender.close()
        self._last_seen, self._seen_at_s = -1, time.monotonic()

    def _is_hanging(self) -> bool:
        """Whether the process has been decoding the same input for too long. Its start-up does not count."""
        number = self._decoding.value
        if number != self._last_seen or number < 0:
            self._last_seen, self._seen_at_s = number, time.monotonic()
        return time.monotonic() - self._seen_at_s > (self._hang_s or HANG_S)

    def _replaced(self, what: str) -> Death:
        self.stop()
        number = self._decoding.value
        if number < 0:
            raise AssertionError(
                f"a worker exited with code {self._process.exitcode} before it decoded an input"
            )
        death = Death(number, what, f"exit code {self._process.exitcode}")
        self._left = self._left[1:]
        self.done = not self._left
        if self._left:
            self._start()
        return death


def shares(batches: range, processes: int) -> list[range]:
    """The batches of each process."""
    return [batches[first::processes] for first in range(min(processes, len(batches)))]


def results_of(workers: Sequence[Worker[Result]]) -> Generator[Result | Death, None, None]:
    """Yields the results of all workers as they come. Ends the workers when it is closed."""
    try:
        while running := [worker for worker in workers if not worker.done]:
            wait([worker.results for worker in running], timeout=1.0)
            for worker in running:
                yield from worker.progress()
    finally:
        for worker in workers:
            worker.stop()


def peak_rss_bytes() -> int:
    """Most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _work(task: Task[Result], batches: range, decoding: "Synchronized[int]", results: Connection) -> None:
    prepared = task.prepare()
    _limit_memory()

    def begins(number: int) -> None:
        decoding.value = number

    for batch in batches:
        results.send(task.judge(prepared, batch, begins))
    results.send(None)


def _limit_memory() -> None:
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (in_use + EXTRA_MEMORY_BYTES, hard))
