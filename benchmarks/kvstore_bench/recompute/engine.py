"""The model that is measured, with the service and without, in the process of the benchmark."""

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
_PATIENCE_S = 600.0


@dataclass(frozen=True, slots=True)
class Asked:
    ttft_s: float
    """Lookup and fetch included."""
    received_bytes: int
    receive_s: float
    exact_tokens: int
    approximate_tokens: int
    recomputed_tokens: int
    prefilled: bool = False
    """With so much to compute again, that was sooner than reusing anything."""


class Engine:
    """Context manager. Needs a cluster at `address`; `settings` are more of the client's."""

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
        # Chunks are stored with the order of tokens that the selectors of this name go by; the others do without.
        self._client = connect(
            address,
            recompute_selector="frequency",
            put_timeout_s=_PATIENCE_S,
            close_timeout_s=_PATIENCE_S,
            fetch_timeout_s=_PATIENCE_S,
            **settings,
        )
        self._cached = CachedModel(model, self._client, model_id=model_id)
        self._client.prepare(self._cached.spec).result()

    def store(self, prompts: Prompts, prompt: Prompt) -> None:
        """Each of the prompt's documents by a request of its own, behind the same prefix. Raises StartupError when one
        of them is not there then."""
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
                f"only {found} of the {wanted} chunks of a prompt's documents are stored: "
                f"{self._client.metrics.snapshot()}"
            )

    @torch.inference_mode()
    def reference(self, prompt: Prompt) -> torch.Tensor:
        """What the model says of the question's tokens when it computes everything, log-probabilities f32
        `[tokens, vocabulary]`."""
        kept = len(prompt.question)
        logits = self.model(prompt.ids, use_cache=False, logits_to_keep=kept).logits
        said: torch.Tensor = logits[0].float().log_softmax(-1)
        return said

    def log_probabilities(self, prompt: Prompt, recompute: Recompute) -> torch.Tensor:
        """The same, over documents that are reused. Raises StartupError when they were not."""
        said = self._cached.question_log_probabilities(
            prompt.ids, segments=prompt.segments, recompute=recompute
        )
        self._require_reuse(prompt)
        return said

    def ask(self, prompt: Prompt, recompute: Recompute) -> Asked:
        """Raises StartupError when the documents were to be reused and did not all come."""
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
        """Seconds of the plain model to its first token."""
        began_s = time.perf_counter()
        self.model.generate(prompt.ids, **_ANSWER)
        return time.perf_counter() - began_s

    def ask_batch(self, prompts: Sequence[Prompt], recompute: Recompute) -> float:
        """Seconds until all of them, asked at once, are answered."""
        queue = RequestQueue(self._cached)
        began_s = time.perf_counter()
        try:
            answers = [
                queue.submit(prompt.ids, segments=prompt.segments, recompute=recompute, **_ANSWER)
                for prompt in prompts
            ]
            for answer in answers:
                answer.result(_PATIENCE_S)
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
