"""The two inference workers of the demo. Each runs in a process of its own, with nothing cached."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kvstore_client.timeline import Span
from kvstore_codec.errors import ConfigurationError
from kvstore_codec.identity import CHUNK_TOKENS
from kvstore_service.first_token import FirstTokenTimer


@dataclass(frozen=True, slots=True)
class Job:
    """What a worker is to do."""

    address: str
    routes: dict[str, str]
    document: Path | None
    document_tokens: int
    new_tokens: int
    dtype: str


@dataclass(frozen=True, slots=True)
class Run:
    """One answered question."""

    path: Literal["cold", "hit"]
    prompt_tokens: int
    ttft_s: float
    tokens_reused: int
    received_bytes: int
    tokens: tuple[int, ...]
    """The answer."""
    text: str
    spans: tuple[Span, ...]


Progress = Callable[[str], None]


def prefill_and_store(job: Job, progress: Progress) -> int:
    """Worker A: answer a first question about the document and store its KV. Returns the chunks stored."""
    from kvstore_service.demo.document import FIRST_QUESTION

    session = _Session(job, progress)
    with session.client:
        progress("prefilling the document")
        session.reusing(session.prompt(FIRST_QUESTION))
        progress("storing its KV")
        session.client.store.flush()
        return session.client.metrics.snapshot().get("chunks_stored", 0)


def answer_twice(job: Job, progress: Progress) -> tuple[Run, Run]:
    """Worker B: answer another question about the document, by full prefill and through the service."""
    from kvstore_service.demo.document import SECOND_QUESTION

    session = _Session(job, progress)
    with session.client:
        prompt = session.prompt(SECOND_QUESTION)
        progress("warming up")  # on other text of the same length: the first prefill of a process is slow
        session.cold(prompt[::-1])
        progress("answering by full prefill")
        cold = session.cold(prompt)
        progress("answering through the service")
        return cold, session.reusing(prompt)


class _Session:
    """A loaded model, plain and wrapped, and a client."""

    def __init__(self, job: Job, progress: Progress) -> None:
        import torch

        from kvstore_client import connect
        from kvstore_client.engines.transformers import CachedModel
        from kvstore_service.demo.document import read_document
        from kvstore_service.models import load_smollm2

        progress("loading SmolLM2-135M")
        self._job = job
        self._document = read_document(job.document)
        self._model, self._tokenizer = load_smollm2(getattr(torch, job.dtype))
        self.client = connect(job.address, routes=job.routes)
        self._cached = CachedModel(self._model, self.client)

    def prompt(self, question: str) -> list[int]:
        from kvstore_service.demo.document import prompt_tokens

        prompt = prompt_tokens(self._tokenizer, self._document, question, self._job.document_tokens)
        if len(prompt) < 2 * CHUNK_TOKENS:
            raise ConfigurationError(
                f"the document makes a prompt of {len(prompt)} tokens, and only full chunks of {CHUNK_TOKENS} are "
                "reused; choose a longer --document"
            )
        return prompt

    def cold(self, prompt: list[int]) -> Run:
        first = FirstTokenTimer()
        output = self._model.generate(self._batch(prompt), streamer=first, **self._decoding)
        span = Span("compute", 0.0, first.ttft_s, "full prefill")
        return self._run("cold", prompt, first, output, 0, 0, (span,))

    def reusing(self, prompt: list[int]) -> Run:
        first = FirstTokenTimer()
        output = self._cached.generate(self._batch(prompt), streamer=first, **self._decoding)
        report = self._cached.last_report
        received = report.fetch.received_bytes if report.fetch else 0
        return self._run("hit", prompt, first, output, report.reused_tokens, received, report.timeline.spans)

    @property
    def _decoding(self) -> dict[str, Any]:
        return {"max_new_tokens": self._job.new_tokens, "do_sample": False}

    @staticmethod
    def _batch(tokens: list[int]) -> Any:
        import torch

        return torch.tensor([tokens])

    def _run(
        self,
        path: Literal["cold", "hit"],
        prompt: list[int],
        first: FirstTokenTimer,
        output: Any,
        reused: int,
        received: int,
        spans: tuple[Span, ...],
    ) -> Run:
        answer = output[0, len(prompt) :].tolist()
        text = self._tokenizer.decode(answer, skip_special_tokens=True)
        return Run(path, len(prompt), first.ttft_s, reused, received, tuple(answer), text, spans)
