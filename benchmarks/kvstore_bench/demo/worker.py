"""The inference workers of the demo. Each runs in a process of its own, with nothing cached."""

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
    """What a worker is to do."""

    address: str
    routes: dict[str, str]
    document: Path | None
    document_tokens: int
    new_tokens: int
    dtype: str


EXACT, LOSSY = "exact-zstd", "medium-klt-pco"
"""The encodings that are shown."""


@dataclass(frozen=True, slots=True)
class Run:
    """One answered question."""

    path: Literal["cold", "hit"]
    encoding: str | None
    """of the reused KV"""
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
    """Give the cluster what LOSSY needs; made first if there is none yet. Returns what was done, in words."""
    import torch

    from kvstore_bench.demo.calibration import demo_calibration
    from kvstore_service.calibration import publish
    from kvstore_service.models import load_smollm2

    progress("loading SmolLM2-135M")
    calibration, words = demo_calibration(*load_smollm2(getattr(torch, job.dtype)), progress)
    publish.publish_calibration(calibration, job.address)
    return words


def prefill_and_store(job: Job, progress: Progress) -> int:
    """Worker A: answer a first question about the document and store its KV, in both encodings. Returns the chunks
    stored."""
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
    """Worker B: answer another question about the document, by full prefill, and through the service in both
    encodings."""
    from kvstore_bench.demo.document import SECOND_QUESTION

    session = _Session(job, progress)
    prompt = session.prompt(SECOND_QUESTION)
    progress("warming up")  # on other text of the same length: the first prefill of a process is slow
    session.cold(prompt[::-1])
    progress("answering by full prefill")
    runs = [session.cold(prompt)]
    for encoding in (EXACT, LOSSY):
        with session.connected(encoding) as cached:
            progress(f"getting what {encoding} needs")  # a machine gets a calibration once
            cached.client.prepare(cached.spec).result()
            progress(f"answering through the service, {encoding}")
            runs.append(session.reusing(cached, prompt))
    return tuple(runs)


class _Session:
    """A loaded model, plain and wrapped."""

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
        """The model behind a client of its own, which stores and accepts that encoding alone."""
        from kvstore_client import connect
        from kvstore_client.engines.transformers import CachedModel

        with connect(
            self._job.address,
            routes=self._job.routes,
            encoding=encoding,
            accept=(encoding,),
            fetch_policy="fixed",  # it is this encoding that is shown
        ) as client:
            cached = CachedModel(self._model, client)
            try:
                yield cached
            finally:
                cached.close()

    def prompt(self, question: str) -> list[int]:
        from kvstore_bench.demo.document import prompt_tokens

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
        timeline = Timeline()
        timeline.add("compute", 0.0, first.ttft_s, "full prefill")
        answer, text = self._answer(prompt, output)
        return Run("cold", None, len(prompt), first.ttft_s, 0, 0, answer, text, timeline)

    def reusing(self, cached: "CachedModel", prompt: list[int]) -> Run:
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
