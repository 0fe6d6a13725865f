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
class _Question:
    input_ids: torch.Tensor
    arguments: dict[str, Any]
    answer: "Future[Any]" = field(default_factory=Future)
    pending: PendingGeneration | None = None
    """Its fetch, once it has started."""


class _Reuse:
    """The Arrival of a question for which stored KV exists."""

    def __init__(self, cached: CachedModel, question: _Question) -> None:
        self._cached, self._question = cached, question
        # Computed KV is written into the same buffers.
        self.size_bytes = question.input_ids.numel() * cached.spec.kv_bytes_per_token

    def start(self) -> None:
        self._question.pending = self._cached.begin(self._question.input_ids, **self._question.arguments)

    def on_ready(self, callback: Callable[[], object]) -> None:
        self._pending.on_ready(callback)

    def remaining_s(self) -> float:
        return self._pending.remaining_s()

    def cancel(self) -> None:
        self._cached.cancel(self._pending)

    @property
    def _pending(self) -> PendingGeneration:
        if self._question.pending is None:
            raise RuntimeError("the fetch was not started")
        return self._question.pending


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
        self._queue = AdmissionQueue[_Question](
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
        question = _Question(input_ids, arguments)
        waits = self._cached.is_stored(input_ids, **arguments)
        self._queue.submit(question, _Reuse(self._cached, question) if waits else None)
        question.answer.add_done_callback(lambda answer: answer.cancelled() and self._queue.cancel(question))
        return question.answer

    def __reduce_ex__(self, protocol: object) -> str:
        raise NotCopyableError(
            "a RequestQueue runs a thread and cannot be copied or pickled; create another one"
        )

    def close(self) -> None:
        """Cancel requests that have not reached the model, and wait for the one being answered."""
        for question in self._queue.close():
            question.answer.cancel()
        self._engine.join()

    def _answer(self) -> None:
        while (question := self._queue.next_ready(threading.TIMEOUT_MAX)) is not None:
            try:
                if question.answer.set_running_or_notify_cancel():
                    self._give_answer(question)
                elif question.pending is not None:
                    self._cached.cancel(question.pending)
            except BaseException:  # a bug here or in a callback: the next requests are still answered
                log.exception("a request did not end properly")
            finally:
                self._queue.finished(question)
                del question  # an idle queue must not keep buffers alive

    def _give_answer(self, question: _Question) -> None:
        try:
            result = self._result(question)
        except BaseException as error:  # any error belongs to the caller
            question.answer.set_exception(error)
        else:
            question.answer.set_result(result)

    def _result(self, question: _Question) -> Any:
        if question.pending is None:
            return self._cached.generate(question.input_ids, **question.arguments)
        return self._cached.finish(question.pending)
