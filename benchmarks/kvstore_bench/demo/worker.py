"""The inference workers of the demo. Each function runs in a new process with empty caches."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from kvstore_bench.first_token import FirstTokenTimer
from kvstore_client.timeline import Timeline
from kvstore_codec.errors import ConfigurationError
from kvstore_codec.identity import CHUNK_TOKENS

if TYPE_CHECKING:
    from kvstore_client.engines.transformers import CachedModel


@dataclass(frozen=True, slots=True)
class Job:
    """Task of a worker."""

    address: str
    """Of the coordinator."""
    routes: dict[str, str]
    """Address that the client dials in place of each endpoint."""
    document: Path | None
    document_tokens: int
    new_tokens: int
    dtype: str


EXACT, LOSSY = "exact-zstd", "medium-klt-pco"
"""Encodings of the demo."""


@dataclass(frozen=True, slots=True)
class Run:
    """One answer to the question, with its measurements."""

    path: Literal["cold", "hit"]
    encoding: str | None
    """Of the reused KV."""
    prompt_tokens: int
    ttft_s: float
    tokens_reused: int
    received_bytes: int
    tokens: tuple[int, ...]
    """The answer."""
    text: str
    timeline: Timeline


Progress = Callable[[str], None]


def publish_calibration(job: Job, progress: Progress) -> str:
    """Publishes the calibration that LOSSY needs to the cluster. Fits it first if none is cached. Returns a sentence
    for the user that says which of these happened."""
    import torch

    from kvstore_bench.demo.calibration import demo_calibration
    from kvstore_service.calibration import publish
    from kvstore_service.models import load_smollm2

    progress("loading SmolLM2-135M")
    calibration, origin = demo_calibration(*load_smollm2(getattr(torch, job.dtype)), progress)
    publish.publish_calibration(calibration, job.address)
    return origin


def prefill_and_store(job: Job, progress: Progress) -> int:
    """Worker A: answers a first question about the document and stores the document's KV in both encodings. Returns the
    number of stored chunks."""
    from kvstore_bench.demo.document import FIRST_QUESTION

    stored = 0
    session = _Session(job, progress)
    for encoding in (EXACT, LOSSY):
        with session.connected(encoding) as cached:
            progress("prefilling the document")
            session.reusing(cached, session.prompt(FIRST_QUESTION))
            progress(f"storing its KV as {encoding}")
            cached.client.store.flush()
            stored += cached.client.metrics.snapshot().get("chunks_stored", 0)
    return stored


def answer_thrice(job: Job, progress: Progress) -> tuple[Run, ...]:
    """Worker B: answers another question about the document three times: after a full prefill, and with reused KV in
    each encoding."""
    from kvstore_bench.demo.document import SECOND_QUESTION

    session = _Session(job, progress)
    prompt = session.prompt(SECOND_QUESTION)
    progress("warming up")  # on other text of the same length, because the first prefill of a process is slow
    session.cold(prompt[::-1])
    progress("answering by full prefill")
    runs = [session.cold(prompt)]
    for encoding in (EXACT, LOSSY):
        with session.connected(encoding) as cached:
            progress(f"fetching what {encoding} needs")  # a calibration is fetched once per machine
            cached.client.prepare(cached.spec).result()
            progress(f"answering through the service, {encoding}")
            runs.append(session.reusing(cached, prompt))
    return tuple(runs)


class _Session:
    """A loaded model and the document."""

    def __init__(self, job: Job, progress: Progress) -> None:
        import torch

        from kvstore_bench.demo.document import read_document
        from kvstore_service.models import load_smollm2

        progress("loading SmolLM2-135M")
        self._job = job
        self._document = read_document(job.document)
        self._model, self._tokenizer = load_smollm2(getattr(torch, job.dtype))

    @contextmanager
    def connected(self, encoding: str) -> "Iterator[CachedModel]":
        """The model with a new client that stores and accepts only this encoding."""
        from kvstore_client import connect
        from kvstore_client.engines.transformers import CachedModel

        with connect(
            self._job.address,
            routes=self._job.routes,
            encoding=encoding,
            accept=(encoding,),
            fetch_policy="fixed",  # the demo shows this encoding, even where computing is faster
        ) as client:
            cached = CachedModel(self._model, client)
            try:
                yield cached
            finally:
                cached.close()

    def prompt(self, question: str) -> list[int]:
        """Token IDs of the prompt. Raises ConfigurationError for a prompt of fewer than two chunks."""
        from kvstore_bench.demo.document import prompt_tokens

        prompt = prompt_tokens(self._tokenizer, self._document, question, self._job.document_tokens)
        if len(prompt) < 2 * CHUNK_TOKENS:
            raise ConfigurationError(
                f"the prompt with this document has {len(prompt)} tokens, but needs {2 * CHUNK_TOKENS}, because only "
                f"full chunks of {CHUNK_TOKENS} tokens are reused; choose a longer --document"
            )
        return prompt

    def cold(self, prompt: list[int]) -> Run:
        """Answers after a full prefill."""
        first = FirstTokenTimer()
        output = self._model.generate(self._batch(prompt), streamer=first, **self._decoding)
        timeline = Timeline()
        timeline.add("compute", 0.0, first.ttft_s, "full prefill")
        answer, text = self._answer(prompt, output)
        return Run("cold", None, len(prompt), first.ttft_s, 0, 0, answer, text, timeline)

    def reusing(self, cached: "CachedModel", prompt: list[int]) -> Run:
        """Answers with KV that the service has."""
        first = FirstTokenTimer()
        output = cached.generate(self._batch(prompt), streamer=first, **self._decoding)
        report = cached.last_report
        answer, text = self._answer(prompt, output)
        return Run(
            "hit",
            ",".join(cached.client.settings.encodings.stored),
            len(prompt),
            first.ttft_s,
            report.reused_tokens,
            report.fetch.received_bytes if report.fetch else 0,
            answer,
            text,
            report.timeline,
        )

    @property
    def _decoding(self) -> dict[str, Any]:
        return {"max_new_tokens": self._job.new_tokens, "do_sample": False}

    @staticmethod
    def _batch(tokens: list[int]) -> Any:
        import torch

        return torch.tensor([tokens])

    def _answer(self, prompt: list[int], output: Any) -> tuple[tuple[int, ...], str]:
        answer: list[int] = output[0, len(prompt) :].tolist()
        return tuple(answer), self._tokenizer.decode(answer, skip_special_tokens=True)
