"""Page store for engines with opaque keys and whole pages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Self

from typing_extensions import Buffer

from kvstore_client.cluster_view import ClusterView
from kvstore_client.fork import renew_in_children
from kvstore_client.lookup import release
from kvstore_client.metrics import ClientMetrics
from kvstore_client.pages.base import JobId, Operation, PageResult
from kvstore_client.pages.context import PageContext
from kvstore_client.pages.event import Event
from kvstore_client.pages.exists import lock_run
from kvstore_client.pages.get import GetPages
from kvstore_client.pages.jobs import Job, JobQueue
from kvstore_client.pages.locks import PageLocks
from kvstore_client.pages.put import put_pages
from kvstore_client.settings import ClientSettings
from kvstore_client.watch import Watch
from kvstore_codec.encoding import Encoding
from kvstore_codec.errors import ConfigurationError
from kvstore_codec.identity import ChunkId
from kvstore_codec.page import ENCODINGS, PageNamespace

MOST_KEYS = 16_384
"""Maximum number of keys in a job. A lookup's answer for that many is far below the limit of a message."""
_READERS = 8


class PageStore:
    """Pages of one namespace, stored under their engine's own keys, which are hashed together with the client's
    `tenant_salt`: clients with different salts do not share pages. Thread-safe. Created by `KVStoreClient.pages`.

    A `submit_*` never blocks: it returns a job id, and `finished` returns the job's result once. `fileno` is readable
    while results wait there. A job that the queue has no room for, or that is submitted after `close`, finishes at
    once, with the reason in its `PageResult`. `exists`, `get_into` and `put` wait for their job and return its result.

    Keys are copied when a job is submitted. Views belong to the caller, who must not change (put) or use (get) their
    bytes until the job has finished. A job finishes within a tenth of a second of its deadline, and only when no thread
    uses its views any more. The content of a view whose page was not delivered is undefined.

    A misbehaving service never makes a method raise or hang.
    """

    def __init__(
        self,
        namespace: PageNamespace,
        settings: ClientSettings,
        parts: Callable[[], tuple[ClusterView, ClientMetrics]],
        *,
        encoding: str = "exact-raw",
        page_tokens: int = 16,
        max_jobs: int = 256,
        max_bytes: int = 1 << 30,
    ) -> None:
        """`parts` returns the client's current parts, which are new ones after a fork. A page holds the KV of
        `page_tokens` tokens, which determines its recompute cost. At most `max_jobs`, whose views have `max_bytes`
        together, wait or run at a time.

        Raises ConfigurationError for an encoding that pages are not stored in, and UnknownEncodingError for one that
        does not exist.
        """
        self.namespace = namespace
        self._settings, self._parts = settings, parts
        self._encoding = Encoding.parse(encoding)
        if self._encoding not in ENCODINGS:
            raise ConfigurationError(f"pages are stored as exact-raw or exact-zstd, not as {encoding}")
        self._page_tokens = page_tokens
        self._max_jobs, self._max_bytes = max_jobs, max_bytes
        self._event = Event()
        self._open()
        renew_in_children(self, PageStore._renew)

    def _open(self) -> None:
        view, metrics = self._parts()
        self._closed = False
        self._context = PageContext(
            view,
            self._settings,
            metrics,
            self.namespace,
            self._encoding,
            self._page_tokens,
            PageLocks(),
            Watch("kvstore-page-watch"),
            ThreadPoolExecutor(_READERS, "kvstore-page-read"),
        )
        self._jobs = JobQueue(
            metrics, self._context.watch, self._event, max_jobs=self._max_jobs, max_bytes=self._max_bytes
        )

    def _renew(self) -> None:
        """In a forked child: start without jobs and locks, with a new event under the same descriptor."""
        if not self._closed:
            self._event.renew()
            self._open()

    @property
    def is_closed(self) -> bool:
        """Whether the store accepts no more jobs."""
        return self._closed

    def fileno(self) -> int:
        """A descriptor for select, poll or an event loop: readable while `finished` has results to return."""
        return self._event.fileno()

    def finished(self) -> list[tuple[JobId, PageResult]]:
        """Jobs finished since the last call, in order. Of more than 4,096 uncollected results the oldest are
        dropped."""
        return [(job.job_id, job.result) for job in self._jobs.finished()]

    def submit_exists(self, keys: Sequence[bytes], timeout_s: float | None = None) -> JobId:
        """Ask how many of the first pages are stored without a gap (`PageResult.run`), and lock them. The node that has
        a locked page keeps it until `unlock`, but for `lease_s` at most. The deadline is
        `lookup_timeout_s` unless `timeout_s` is given; the lookup itself takes `lookup_timeout_s` at most."""
        return self._exists(keys, timeout_s, is_awaited=False).job_id

    def submit_get(
        self, keys: Sequence[bytes], views: Sequence[Buffer], timeout_s: float | None = None
    ) -> JobId:
        """Read each page into its view, which is writable, contiguous, and exactly of the page's size. The deadline is
        `fetch_timeout_s` unless `timeout_s` is given. Locked pages are read without a lookup."""
        return self._get(keys, views, timeout_s, is_awaited=False).job_id

    def submit_put(
        self, keys: Sequence[bytes], views: Sequence[Buffer], timeout_s: float | None = None
    ) -> JobId:
        """Store the content of contiguous views, 1 byte to 128 MiB each. Pages that are stored already count as stored,
        and stay unchanged. The deadline is `put_timeout_s` unless `timeout_s` is given."""
        return self._put(keys, views, timeout_s, is_awaited=False).job_id

    def exists(self, keys: Sequence[bytes], timeout_s: float | None = None) -> int:
        """Like `submit_exists`, but waits and returns the length of the run."""
        return self._awaited(self._exists(keys, timeout_s, is_awaited=True)).run

    def get_into(
        self, keys: Sequence[bytes], views: Sequence[Buffer], timeout_s: float | None = None
    ) -> PageResult:
        """Like `submit_get`, but waits."""
        return self._awaited(self._get(keys, views, timeout_s, is_awaited=True))

    def put(
        self, keys: Sequence[bytes], views: Sequence[Buffer], timeout_s: float | None = None
    ) -> PageResult:
        """Like `submit_put`, but waits."""
        return self._awaited(self._put(keys, views, timeout_s, is_awaited=True))

    def unlock(self, keys: Sequence[bytes]) -> None:
        """Remove one lock from each of these pages, without waiting. Never fails: pages without a lock are ignored, and
        a lease whose release fails expires by itself."""
        release(self._context.view, self._context.locks.release(self._names(keys)))

    def close(self) -> None:
        """Give jobs `close_timeout_s` to finish, then end them, and unlock everything. Uncollected results stay
        available; `fileno` is closed."""
        if self._closed:
            return
        self._closed = True
        self._jobs.close(self._settings.timeouts.close_s)
        self._context.readers.shutdown(wait=False, cancel_futures=True)
        release(self._context.view, self._context.locks.clear())

    def _exists(self, keys: Sequence[bytes], timeout_s: float | None, *, is_awaited: bool) -> Job:
        keys = tuple(keys)

        def work(job: Job) -> PageResult:
            return lock_run(self._context, job, self._names(keys))

        return self._submit(
            Operation.EXISTS, len(keys), 0, timeout_s, self._settings.timeouts.lookup_s, work, is_awaited
        )

    def _get(
        self, keys: Sequence[bytes], views: Sequence[Buffer], timeout_s: float | None, *, is_awaited: bool
    ) -> Job:
        keys, rows = tuple(keys), [_row(view, writable=True) for view in views]

        def work(job: Job) -> PageResult:
            return GetPages(self._context, self._names(keys), rows).run(job)

        default_s = self._settings.timeouts.fetch_s
        return self._submit(
            Operation.GET, len(keys), _bytes(rows), timeout_s, default_s, work, is_awaited, rows
        )

    def _put(
        self, keys: Sequence[bytes], views: Sequence[Buffer], timeout_s: float | None, *, is_awaited: bool
    ) -> Job:
        keys, rows = tuple(keys), [_row(view, writable=False) for view in views]

        def work(job: Job) -> PageResult:
            return put_pages(self._context, job, self._names(keys), rows)

        default_s = self._settings.timeouts.put_s
        return self._submit(
            Operation.PUT, len(keys), _bytes(rows), timeout_s, default_s, work, is_awaited, rows
        )

    def _submit(
        self,
        operation: Operation,
        pages: int,
        size_bytes: int,
        timeout_s: float | None,
        default_s: float,
        work: Callable[[Job], PageResult],
        is_awaited: bool,
        rows: Sequence[memoryview | None] | None = None,
    ) -> Job:
        refused = None
        if pages > MOST_KEYS:
            refused = "too_many_keys"
        elif rows is not None and len(rows) != pages:
            refused = "bad_view"
        timeout_s = default_s if timeout_s is None else timeout_s
        return self._jobs.submit(
            operation, pages, size_bytes, timeout_s, work, is_awaited=is_awaited, refused=refused
        )

    def _awaited(self, job: Job) -> PageResult:
        job.done.wait()
        return job.result

    def _names(self, keys: Sequence[bytes]) -> list[ChunkId]:
        salt = self._settings.tenant_salt.get_secret_value().encode()
        return self.namespace.chunk_ids(keys, salt)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _row(view: Buffer, *, writable: bool) -> memoryview | None:
    """The view's bytes; None when they are not contiguous, or not `writable` although they must be."""
    try:
        row = memoryview(view)
        if not row.nbytes or not row.c_contiguous or (writable and row.readonly):
            return None
        return row.cast("B")
    except (TypeError, ValueError, BufferError):
        return None


def _bytes(rows: Sequence[memoryview | None]) -> int:
    return sum(row.nbytes for row in rows if row is not None)
