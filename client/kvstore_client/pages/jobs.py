"""Jobs over pages: a bounded queue, worker threads, and results to collect."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from kvstore_client.metrics import ClientMetrics
from kvstore_client.pages.base import JobId, Operation, PageResult
from kvstore_client.pages.event import Event
from kvstore_client.request_id import in_request
from kvstore_client.watch import Watch

log = logging.getLogger(__name__)

_THREADS: Final = {Operation.EXISTS: 2, Operation.GET: 4, Operation.PUT: 2}
"""Number of jobs that run at a time, by operation. Each operation has its own threads: an `exists` never waits for a
put to a slow node."""
_MOST_UNCOLLECTED = 4096
"""Results that may wait for `finished`; beyond that the oldest are dropped."""
_JOIN_S = 2.0
"""How long `close` waits for threads whose streams it has cancelled, seconds."""


@dataclass(eq=False, slots=True)
class Job:
    """A job; `work` runs in a thread of the queue. No view of the caller is used after `done`."""

    job_id: JobId
    operation: Operation
    pages: int
    size_bytes: int
    deadline_s: float
    work: Callable[[Job], PageResult] | None
    is_awaited: bool
    """Whether the caller waits for `done`, and collects the result there."""
    done: threading.Event = field(default_factory=threading.Event)
    result: PageResult = field(default_factory=lambda: PageResult(()))
    """Valid once `done` is set."""

    @property
    def left_s(self) -> float:
        """Seconds until the deadline; 0 afterwards."""
        return max(0.0, self.deadline_s - time.monotonic())


class JobQueue:
    """Thread-safe. Only `close` blocks."""

    def __init__(
        self, metrics: ClientMetrics, watch: Watch, event: Event, *, max_jobs: int, max_bytes: int
    ) -> None:
        """At most `max_jobs`, whose views have `max_bytes` together, wait or run at a time."""
        self._metrics, self._watch, self._event = metrics, watch, event
        self._max_jobs, self._max_bytes = max_jobs, max_bytes
        self._changed = threading.Condition()
        self._waiting: dict[Operation, deque[Job]] = {operation: deque() for operation in Operation}
        self._idle = dict.fromkeys(Operation, 0)
        self._threads: dict[Operation, list[threading.Thread]] = {operation: [] for operation in Operation}
        self._finished: deque[Job] = deque()
        self._jobs = self._bytes = self._last_id = 0
        self._closed = False

    def submit(
        self,
        operation: Operation,
        pages: int,
        size_bytes: int,
        timeout_s: float,
        work: Callable[[Job], PageResult],
        *,
        is_awaited: bool,
        refused: str | None = None,
    ) -> Job:
        """Queue a job. A refused job finishes at once, with the caller's reason `refused`, `queue_full`, `closed`, or
        `no_resources` when this process has no thread left."""
        deadline_s = time.monotonic() + timeout_s
        with self._changed:
            self._last_id += 1
            job_id = JobId(self._last_id)
            job = Job(job_id, operation, pages, size_bytes, deadline_s, in_request(work), is_awaited)
            if self._closed:
                refused = "closed"
            if refused is None and (
                self._jobs >= self._max_jobs or self._bytes + size_bytes > self._max_bytes
            ):
                refused = "queue_full"
            self._jobs += 1
            self._bytes += size_bytes
            if refused is None and not self._has_thread(operation):
                refused = "no_resources"
            if refused is None:
                self._waiting[operation].append(job)
                self._changed.notify_all()
        if refused is not None:
            self._finish(job, PageResult.failed(pages, refused))
        return job

    def finished(self) -> list[Job]:
        """Jobs finished since the last call, except awaited ones."""
        with self._changed:
            self._event.clear()
            finished, self._finished = list(self._finished), deque()
        return finished

    def __len__(self) -> int:
        """Number of waiting and running jobs."""
        return self._jobs

    def close(self, timeout_s: float) -> None:
        """Refuse new jobs, give the others `timeout_s` to end, then end them and close the event. Returns soon after
        that time."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._jobs, timeout_s)
            waiting = [job for jobs in self._waiting.values() for job in jobs]
            for jobs in self._waiting.values():
                jobs.clear()
        for job in waiting:
            self._finish(job, PageResult.failed(job.pages, "closed"))
        self._watch.stop(_JOIN_S)
        until_s = time.monotonic() + _JOIN_S
        for thread in [thread for threads in self._threads.values() for thread in threads]:
            thread.join(max(0.0, until_s - time.monotonic()))
        with self._changed:  # a thread that is still running may set it
            self._event.close()

    def check(self) -> None:
        """Finish jobs whose deadline has passed in the queue."""
        now_s = time.monotonic()
        with self._changed:
            late = [job for jobs in self._waiting.values() for job in jobs if job.deadline_s <= now_s]
            for job in late:
                self._waiting[job.operation].remove(job)
        for job in late:
            self._finish(job, PageResult.failed(job.pages, "timeout"))

    def cancel(self) -> None:
        """Nothing to do: `close` ends waiting jobs."""

    def _has_thread(self, operation: Operation) -> bool:
        """Whether a thread exists that will take a job, and another one that ends it at its deadline. The caller holds
        the lock."""
        try:
            self._watch.add(self)
        except RuntimeError:
            return False
        threads = self._threads[operation]
        if self._idle[operation] > len(self._waiting[operation]) or len(threads) >= _THREADS[operation]:
            return True
        thread = threading.Thread(
            target=self._run, args=(operation,), name=f"kvstore-page-{operation}", daemon=True
        )
        try:
            thread.start()
        except RuntimeError:
            return bool(threads)
        threads.append(thread)
        return True

    def _run(self, operation: Operation) -> None:
        waiting = self._waiting[operation]
        while True:
            with self._changed:
                self._idle[operation] += 1
                self._changed.wait_for(lambda: waiting or self._closed)
                self._idle[operation] -= 1
                if not waiting:
                    return
                job = waiting.popleft()
            self._finish(job, self._worked(job))
            del job  # it refers to the caller's views

    def _worked(self, job: Job) -> PageResult:
        if not job.left_s or job.work is None:
            return PageResult.failed(job.pages, "timeout")
        try:
            return job.work(job)
        except Exception as error:  # a bug in this package must not reach the engine
            self._metrics.failures.warn(
                "page_internal_error", f"a {job.operation} of {job.pages} pages failed: {error}", error
            )
            return PageResult.failed(job.pages, "internal_error")

    def _finish(self, job: Job, result: PageResult) -> None:
        self._metrics.paged(job.operation, result.ok.count(True), result.reasons)
        forgotten = False
        with self._changed:
            job.work, job.result = None, result
            self._jobs -= 1
            self._bytes -= job.size_bytes
            if not self._jobs:
                self._watch.discard(self)
            if not job.is_awaited:
                forgotten = len(self._finished) >= _MOST_UNCOLLECTED
                if forgotten:
                    self._finished.popleft()
                self._finished.append(job)
                self._event.set()
            job.done.set()
            self._changed.notify_all()
        if forgotten:
            self._metrics.failures.warn(
                "page_results_forgotten",
                f"results of jobs over pages are dropped: more than {_MOST_UNCOLLECTED} were never collected",
            )
