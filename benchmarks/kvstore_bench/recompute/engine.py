"""The measured model, with the service and without. It runs in the process of the benchmark."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from kvstore_bench.recompute.prompts import Prompt, Prompts
from kvstore_client import connect
from kvstore_client.engines.transformers import CachedModel
from kvstore_client.engines.transformers.requests import RequestQueue
from kvstore_client.recompute import Recompute
from kvstore_codec.errors import StartupError
from kvstore_codec.identity import CHUNK_TOKENS

_ANSWER: dict[str, Any] = {"max_new_tokens": 1, "min_new_tokens": 1, "do_sample": False}
_NO_DEADLINE_S = 600.0


@dataclass(frozen=True, slots=True)
class Asked:
    """Measurements of one request."""

    ttft_s: float
    """Including lookup and fetch."""
    received_bytes: int
    receive_s: float
    exact_tokens: int
    approximate_tokens: int
    recomputed_tokens: int
    prefilled: bool = False
    """Whether the engine reused nothing, because a full prefill was faster at this recompute ratio."""


class Engine:
    """A model with a client of the cluster at `address`. `settings` are further settings of the client. Close it after
    use."""

    def __init__(
        self,
        address: str,
        model: PreTrainedModel,
        tokenizer: Any,
        *,
        model_id: str | None = None,
        **settings: Any,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        # With this selector, chunks are stored with their token order, which the `frequency` selectors need. Other
        # selectors need nothing stored.
        self._client = connect(
            address,
            recompute_selector="frequency",
            put_timeout_s=_NO_DEADLINE_S,
            close_timeout_s=_NO_DEADLINE_S,
            fetch_timeout_s=_NO_DEADLINE_S,
            **settings,
        )
        self._cached = CachedModel(model, self._client, model_id=model_id)
        self._client.prepare(self._cached.spec).result()

    def store(self, prompts: Prompts, prompt: Prompt) -> None:
        """Stores each of the prompt's documents by a request of its own, after the same prefix. Raises StartupError
        when not all of their chunks are stored."""
        self._cached.store = True
        for index in range(len(prompt.documents)):
            request = prompts.storing(prompt, index)
            self._cached.generate(request.ids, segments=request.segments, **_ANSWER)
        self._client.store.flush()
        self._cached.store = False
        placed = self._client.segment_chunks(self._cached.spec, prompt.ids[0].tolist(), prompt.segments)
        match = self._client.match_segments(self._cached.spec, placed)
        self._client.release(match)
        found, wanted = len(match.chunks), prompt.document_tokens // CHUNK_TOKENS
        if found < wanted:
            raise StartupError(
                f"only {found} of the {wanted} chunks of a prompt's documents are stored; "
                f"the client counted {self._client.metrics.snapshot()}"
            )

    @torch.inference_mode()
    def reference(self, prompt: Prompt) -> torch.Tensor:
        """Log-probabilities of the question's tokens when the model computes everything, f32 `[tokens, vocabulary]`."""
        kept = len(prompt.question)
        logits = self.model(prompt.ids, use_cache=False, logits_to_keep=kept).logits
        predicted: torch.Tensor = logits[0].float().log_softmax(-1)
        return predicted

    def log_probabilities(self, prompt: Prompt, recompute: Recompute) -> torch.Tensor:
        """Log-probabilities of the question's tokens after reused documents, f32 `[tokens, vocabulary]`. Raises
        StartupError when not all of the documents were reused."""
        predicted = self._cached.question_log_probabilities(
            prompt.ids, segments=prompt.segments, recompute=recompute
        )
        self._require_reuse(prompt)
        return predicted

    def ask(self, prompt: Prompt, recompute: Recompute) -> Asked:
        """Answers one request with the service. Raises StartupError when not all documents were reused, unless a full
        prefill was faster."""
        began_s = time.perf_counter()
        self._cached.generate(prompt.ids, segments=prompt.segments, recompute=recompute, **_ANSWER)
        ttft_s = time.perf_counter() - began_s
        report = self._cached.last_report
        if report.fetch is None and report.bypassed is None:
            return Asked(ttft_s, 0, 0.0, 0, 0, 0, prefilled=True)
        self._require_reuse(prompt)
        return Asked(
            ttft_s,
            report.fetch.received_bytes if report.fetch is not None else 0,
            report.timeline.busy_s("receive"),
            report.exact_tokens,
            report.approximate_tokens,
            report.recomputed_tokens,
        )

    def compute(self, prompt: Prompt) -> float:
        """Time to first token of the model without the service, seconds."""
        began_s = time.perf_counter()
        self.model.generate(prompt.ids, **_ANSWER)
        return time.perf_counter() - began_s

    def ask_batch(self, prompts: Sequence[Prompt], recompute: Recompute) -> float:
        """Submits all requests at once. Returns the seconds until all are answered."""
        queue = RequestQueue(self._cached)
        began_s = time.perf_counter()
        try:
            answers = [
                queue.submit(prompt.ids, segments=prompt.segments, recompute=recompute, **_ANSWER)
                for prompt in prompts
            ]
            for answer in answers:
                answer.result(_NO_DEADLINE_S)
            return time.perf_counter() - began_s
        finally:
            queue.close()

    def close(self) -> None:
        self._cached.close()
        self._client.close()

    def _require_reuse(self, prompt: Prompt) -> None:
        report = self._cached.last_report
        reused = report.exact_tokens + report.approximate_tokens
        if reused < prompt.document_tokens:
            raise StartupError(
                f"only {reused} of {prompt.document_tokens} tokens of documents were reused"
                + (f": {report.bypassed}" if report.bypassed else "")
            )
