"""A queue of requests for one model: requests that wait for KV do not block the others."""

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch

from kvstore_client.admission import AdmissionQueue
from kvstore_client.engines.transformers.model import CachedModel
from kvstore_client.fork import renew_in_children
from kvstore_client.reuse.pending import PendingGeneration
from kvstore_codec.errors import NotCopyableError

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Request:
    input_ids: torch.Tensor
    arguments: dict[str, Any]
    answer: "Future[Any]" = field(default_factory=Future)
    pending: PendingGeneration | None = None
    """Its fetch, once it has started."""


class _RequestArrival:
    """The Arrival of a request for which stored KV exists."""

    def __init__(self, cached: CachedModel, request: _Request) -> None:
        self._cached, self._request = cached, request
        # Computed KV is written into the same buffers.
        self.size_bytes = request.input_ids.numel() * cached.spec.kv_bytes_per_token

    def start(self) -> None:
        self._request.pending = self._cached.begin(self._request.input_ids, **self._request.arguments)

    def on_ready(self, callback: Callable[[], object]) -> None:
        self._pending.on_ready(callback)

    def remaining_s(self) -> float:
        return self._pending.remaining_s()

    def cancel(self) -> None:
        self._cached.cancel(self._pending)

    @property
    def _pending(self) -> PendingGeneration:
        if self._request.pending is None:
            raise RuntimeError("the fetch was not started")
        return self._request.pending


class RequestQueue:
    """Answers requests one at a time in its own thread, as soon as their KV has arrived. Requests keep their order,
    except that one that waits for KV is passed by those that do not. Thread-safe.

    At most `fetches` requests fetch at a time, into buffers of at most `buffer_bytes` in total (default: the client's
    `pool_bytes`). When the engine is idle, a request starts `early_s` before its KV is expected, and computes while the
    rest arrives.

    On a CPU the model computes about 10 % slower in this thread after another thread has computed with torch (measured
    on two cores; the module `threads` explains why).
    """

    def __init__(
        self, cached: CachedModel, *, fetches: int = 4, buffer_bytes: int | None = None, early_s: float = 0.05
    ) -> None:
        client = cached.client
        limit_bytes = client.settings.fetch.pool_bytes if buffer_bytes is None else buffer_bytes
        self._cached = cached
        self._fetches, self._buffer_bytes, self._early_s = fetches, limit_bytes, early_s
        self._start()
        renew_in_children(self, RequestQueue._start)

    def _start(self) -> None:
        """Start with an empty queue: requests that wait when a process forks are answered by the parent."""
        self._queue = AdmissionQueue[_Request](
            self._cached.client.metrics,
            fetches=self._fetches,
            buffer_bytes=self._buffer_bytes,
            early_s=self._early_s,
        )
        self._engine = threading.Thread(target=self._answer, name="kvstore-engine", daemon=True)
        self._engine.start()

    def submit(self, input_ids: torch.Tensor, **arguments: Any) -> "Future[Any]":
        """Queue a request and return a future with the result of `CachedModel.generate`; `arguments` may include
        `segments` and `recompute`. The future's `cancel` drops a request that has not reached the model yet.

        The lookup runs in the caller's thread: about 2 ms, at most `lookup_timeout_s`. It takes no lease, because the
        fetch may start much later. Raises InvalidTokensError for segments that do not sum to the prompt, and ValueError
        after `close`.
        """
        request = _Request(input_ids, arguments)
        waits = self._cached.is_stored(input_ids, **arguments)
        self._queue.submit(request, _RequestArrival(self._cached, request) if waits else None)
        request.answer.add_done_callback(lambda answer: answer.cancelled() and self._queue.cancel(request))
        return request.answer

    def __reduce_ex__(self, protocol: object) -> str:
        raise NotCopyableError(
            "a RequestQueue runs a thread and cannot be copied or pickled; create another one"
        )

    def close(self) -> None:
        """Cancel requests that have not reached the model, and wait for the one being answered."""
        for request in self._queue.close():
            request.answer.cancel()
        self._engine.join()

    def _answer(self) -> None:
        while (request := self._queue.next_ready(threading.TIMEOUT_MAX)) is not None:
            try:
                if request.answer.set_running_or_notify_cancel():
                    self._give_answer(request)
                elif request.pending is not None:
                    self._cached.cancel(request.pending)
            except BaseException:  # a bug here or in a callback: the next requests are still answered
                log.exception("a request did not end properly")
            finally:
                self._queue.finished(request)
                del request  # an idle queue must not keep buffers alive

    def _give_answer(self, request: _Request) -> None:
        try:
            result = self._result(request)
        except BaseException as error:  # any error belongs to the caller
            request.answer.set_exception(error)
        else:
            request.answer.set_result(result)

    def _result(self, request: _Request) -> Any:
        if request.pending is None:
            return self._cached.generate(request.input_ids, **request.arguments)
        return self._cached.finish(request.pending)
