"""`CachedModel`: a transformers model that reuses KV computed earlier by any worker."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from kvstore_client.client import KVStoreClient
from kvstore_client.engines.transformers.call import GenerateCall
from kvstore_client.engines.transformers.canary import ModelCanary
from kvstore_client.engines.transformers.costs import costs_of
from kvstore_client.engines.transformers.engine import TransformersEngine
from kvstore_client.engines.transformers.identity.guard import ModelIdentity
from kvstore_client.engines.transformers.spec import loaded_model
from kvstore_client.recompute import Recompute
from kvstore_client.reuse.pending import PendingGeneration
from kvstore_client.reuse.report import GenerationReport
from kvstore_client.reuse.session import ReuseSession
from kvstore_client.settings import Budget, parse_budget
from kvstore_codec.errors import ConfigurationError, NotCopyableError, UnsupportedModelError
from kvstore_codec.model_spec import ModelSpec


class CachedModel:
    """Wraps a causal language model of the Llama, Qwen2, Qwen3, Mistral or Gemma 3 (text) family.

    `generate` takes the same arguments and returns the same result as the model's own. Stored KV is fetched layer by
    layer while the model computes the other tokens, and newly computed KV is stored in the background. When the service
    fails, the missing KV is computed and the call still returns its answer.

    A model's canary is KV of a fixed text in the cluster, made by the first worker with that model. A background thread
    compares the model's own KV with it. The first calls wait for the result, together for at most `canary_timeout_s`;
    calls without a result neither reuse nor store KV. When the KV differs, the model's calls never reuse or store KV,
    until its canary is replaced (`kvstore models replace`).

    One thread at a time may use a `CachedModel`; any thread may call `begin` and `is_stored` meanwhile.

    The wrapper changes nothing on the model except for hooks on its key projections, which `close` removes. It reserves
    memory of the client's buffer pool for a prompt of the model's maximum length, up to the pool's limit. Raises
    UnsupportedModelError for a model whose KV cannot be reused.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        client: KVStoreClient,
        *,
        model_id: str | None = None,
        store: bool = True,
    ) -> None:
        self.model = model = loaded_model(model)
        self.client = client
        self._identity = ModelIdentity(model, model_id)
        costs = costs_of(model, self.spec, client)
        self._engine = TransformersEngine(model, self._identity)
        self.canary = ModelCanary(model, client, self._identity)
        """Compares the model's KV with its canary in the cluster. Calls wait for the first verdict, within
        `canary_timeout_s`."""
        self._session = ReuseSession(self._engine, client, self.canary, costs, store=store)
        client.buffers.reserve(model.config.max_position_embeddings * self.spec.kv_bytes_per_token)

    @property
    def spec(self) -> ModelSpec:
        """Identity of the model, which names its chunks. It changes when the model is changed."""
        return self._identity.spec

    @property
    def store(self) -> bool:
        """Whether newly computed KV is stored."""
        return self._session.storing.active

    @store.setter
    def store(self, active: bool) -> None:
        self._session.storing.active = active

    @property
    def last_report(self) -> GenerationReport:
        """What the latest `generate` reused; empty before the first call."""
        return self._session.last_report

    def generate(
        self,
        input_ids: torch.Tensor | None = None,
        generation_config: Any = None,
        *,
        segments: Sequence[int] | None = None,
        recompute: Recompute | None = None,
        budget: Budget | None = None,
        **arguments: Any,
    ) -> Any:
        """Like the model's own `generate`. Reuses KV for `input_ids` of shape `[1, tokens]` with greedy decoding or
        sampling.

        Other calls run without reuse, and `last_report.bypassed` gives the reason.

        `segments` are the lengths of the prompt's consecutive parts and sum to its tokens: a beginning shared by all
        prompts, documents, and the question as the last part. A document is then found at any position. Where its KV
        was computed in another context, `recompute` says how it is repaired; by default the client's settings say so,
        with the recompute ratio that was tuned for the storage tier. Raises InvalidTokensError for segments that do not
        sum to the prompt.

        `budget` is the share of a stored prefix's tokens that the rest of the prompt attends to, above 0 and up to 1
        (docs/reprefill.md): the parts that matter to it are read, the others are not. This changes the answer. With
        "auto" share and encoding are the quickest that the setting `floor` allows. Default: the setting `budget`;
        without one all of the prefix is reused. Has no effect on segments. Raises ConfigurationError for a budget out
        of range.
        """
        if input_ids is None:
            input_ids = arguments.pop("inputs", None)
        if generation_config is not None:
            arguments["generation_config"] = generation_config
        call = GenerateCall(self.model, input_ids, arguments, segments, recompute, self._budget(budget))
        return self._session.answer(call)

    def begin(
        self,
        input_ids: torch.Tensor | None,
        *,
        segments: Sequence[int] | None = None,
        recompute: Recompute | None = None,
        budget: Budget | None = None,
        **arguments: Any,
    ) -> PendingGeneration:
        """Look up the prompt's stored KV and start to fetch it: the first half of `generate`.

        Computes nothing and waits only for the lookup, so that other prompts can be answered while the KV arrives
        (`PendingGeneration.on_ready`). Pass the result to `finish` or to `cancel`.
        """
        call = GenerateCall(self.model, input_ids, arguments, segments, recompute, self._budget(budget))
        return self._session.begin(call)

    def is_stored(
        self,
        input_ids: torch.Tensor | None,
        *,
        segments: Sequence[int] | None = None,
        recompute: Recompute | None = None,
        budget: Budget | None = None,
        **arguments: Any,
    ) -> bool:
        """Whether `begin`, called with the same arguments, would find KV to fetch. Raises the same errors."""
        call = GenerateCall(self.model, input_ids, arguments, segments, recompute, self._budget(budget))
        return self._session.is_stored(call)

    def finish(self, pending: PendingGeneration) -> Any:
        """Compute the rest of the answer: the second half of `generate`, with its result."""
        return self._session.finish(pending)

    def cancel(self, pending: PendingGeneration) -> None:
        """Abandon a pending generation and release its resources. May be called repeatedly, and after `finish`."""
        pending.cancel()

    @torch.inference_mode()
    def question_log_probabilities(
        self,
        input_ids: torch.Tensor,
        *,
        segments: Sequence[int] | None = None,
        recompute: Recompute | None = None,
        budget: Budget | None = None,
    ) -> torch.Tensor:
        """Log-probabilities at each token of the last segment, or, with a `budget` and without segments, at each token
        behind the stored prefix, f32 `[tokens, vocabulary]`. For measuring how reuse changes the answer.

        Stored KV of the other segments is always reused, also where `generate` would compute it because that is faster.
        Raises UnsupportedModelError for a model whose segments cannot be reused, and FetchError when stored KV does not
        arrive, when the canary does not allow reuse, or when there are no key summaries to choose by."""
        decoder = self._engine.decoder
        if decoder is None:
            raise UnsupportedModelError(f"segments of {self.spec.model_id} cannot be reused")
        budget = None if budget is None else self._budget(budget)
        call = GenerateCall(self.model, input_ids, {}, segments, recompute, budget)
        return decoder.log_probabilities(self._session.question_states(call))

    def _budget(self, budget: Budget | None) -> Budget | None:
        if budget is None:
            return self.client.settings.reprefill.budget
        try:
            return parse_budget(budget)
        except ValueError as error:
            raise ConfigurationError(str(error)) from None

    def __reduce_ex__(self, protocol: object) -> str:
        raise NotCopyableError(
            "a CachedModel is bound to its model's hooks and its client's connections and cannot be copied or pickled; "
            "copy or save `cached.model`, and wrap the copy: CachedModel(copy, client)"
        )

    def close(self) -> None:
        """Remove the hooks from the model and stop the comparison with its canary. May be called more than once. Waits
        for a comparison that is computing, which takes a prefill of 256 tokens.

        The model and the client stay usable. Later calls still answer and may reuse KV, but store none."""
        self.canary.close()
        self._engine.close()
