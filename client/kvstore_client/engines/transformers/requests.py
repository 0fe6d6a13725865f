"""Several requests for one model: who waits for KV does not hold up who does not."""

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
    """Its fetch, once that has pending."""


class _Reuse:
    """The Arrival of a question of which something is stored."""

    def __init__(self, cached: CachedModel, question: _Question) -> None:
        self._cached, self._question = cached, question
        # What is computed goes into the same buffers.
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
    """Answers requests one after the other in a thread of its own, each when its KV is there: in order, except that who
    waits for KV is passed by who does not. Thread-safe.

    At most `fetches` requests fetch at a time, into buffers of at most `buffer_bytes` (default: the client's
    `pool_bytes`). While there is nothing else to do, a request is taken `early_s` before its KV is expected, and
    computes behind the rest as it arrives.

    On a processor the model computes about a tenth slower in this thread when another one has computed with torch, too
    (measured on two cores; `threads` says why).
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
        """Empty: requests that wait when a process forks are answered by the parent."""
        self._queue = AdmissionQueue[_Question](
            self._cached.client.metrics,
            fetches=self._fetches,
            buffer_bytes=self._buffer_bytes,
            early_s=self._early_s,
        )
        self._engine = threading.Thread(target=self._answer, name="kvstore-engine", daemon=True)
        self._engine.start()

    def submit(self, input_ids: torch.Tensor, **arguments: Any) -> "Future[Any]":
        """What `CachedModel.generate` would return, `segments` and `recompute` among its arguments. The future's
        `cancel` ends what has not reached the model yet.

        Looks up in the caller's thread what is stored: about 2 ms, at most `lookup_timeout_s`. It may be long until it
        is this request's turn to fetch, so nothing stays leased meanwhile. Raises InvalidTokensError for segments that
        do not make the prompt, ValueError after `close`.
        """
        question = _Question(input_ids, arguments)
        waits = self._cached.is_stored(input_ids, **arguments)
        self._queue.submit(question, _Reuse(self._cached, question) if waits else None)
        question.answer.add_done_callback(lambda answer: answer.cancelled() and self._queue.cancel(question))
        return question.answer

    def __reduce_ex__(self, protocol: object) -> str:
        raise NotCopyableError(
            "a RequestQueue runs a thread and cannot be copied or pickled; make another one"
        )

    def close(self) -> None:
        """Cancel what has not reached the model, and wait for the answer that is being given."""
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
            except (
                BaseException
            ):  # a mistake of ours, or of a callback of the future: the next are to be answered
                log.exception("a request was not ended as it should be")
            finally:
                self._queue.finished(question)
                del question  # an idle queue holds on to nobody's buffers

    def _give_answer(self, question: _Question) -> None:
        try:
            result = self._result(question)
        except BaseException as error:  # the asker's to handle, whatever it is
            question.answer.set_exception(error)
        else:
            question.answer.set_result(result)

    def _result(self, question: _Question) -> Any:
        if question.pending is None:
            return self._cached.generate(question.input_ids, **question.arguments)
        return self._cached.finish(question.pending)
