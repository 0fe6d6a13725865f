"""`CachedModel`: a transformers model that reuses KV which any worker has computed before."""

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
from kvstore_codec.errors import NotCopyableError, UnsupportedModelError
from kvstore_codec.model_spec import ModelSpec


class CachedModel:
    """Wraps a causal language model of the Llama, Qwen2, Qwen3, Mistral or Gemma 3 (text) family.

    `generate` takes what the model's own takes and returns what it returns. Tokens whose KV is stored are fetched
    instead of computed, layer by layer under the computation of the rest; what was computed is stored afterwards in
    the background. Whatever the service does, the answer comes: what does not arrive is computed.

    The wrapped model is not changed but for hooks on its key projections, which `close` takes off again. Raises
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
        """Whether the model computes what the cluster's KV was computed with; calls wait for its first verdict."""
        self._session = ReuseSession(self._engine, client, self.canary, costs, store=store)
        client.buffers.reserve(model.config.max_position_embeddings * self.spec.kv_bytes_per_token)

    @property
    def spec(self) -> ModelSpec:
        """What names this model's chunks; another one once the model computes something else."""
        return self._identity.spec

    @property
    def store(self) -> bool:
        """Whether what is computed is stored."""
        return self._session.storing.active

    @store.setter
    def store(self, active: bool) -> None:
        self._session.storing.active = active

    @property
    def last_report(self) -> GenerationReport:
        """What the latest `generate` reused; empty before the first."""
        return self._session.last_report

    def generate(
        self,
        input_ids: torch.Tensor | None = None,
        generation_config: Any = None,
        *,
        segments: Sequence[int] | None = None,
        recompute: Recompute | None = None,
        **arguments: Any,
    ) -> Any:
        """Like the model's own `generate`; reuses for `input_ids` of `[1, tokens]` and plain decoding or sampling.

        Other calls are passed on as they are, and `last_report.bypassed` says why.

        `segments` are the lengths of neighbouring parts of the prompt, which sum to its tokens: a beginning that all
        prompts share, documents, and last the question. Then a document is found again wherever it stands, and what is
        reused in another context than its own is repaired as `recompute` says (when not given: as the client's settings
        say, with the share of tokens that was tuned for where it is stored).
        Raises InvalidTokensError for segments that do not make the prompt.
        """
        if input_ids is None:
            input_ids = arguments.pop("inputs", None)
        if generation_config is not None:
            arguments["generation_config"] = generation_config
        return self._session.answer(GenerateCall(self.model, input_ids, arguments, segments, recompute))

    def begin(
        self,
        input_ids: torch.Tensor | None,
        *,
        segments: Sequence[int] | None = None,
        recompute: Recompute | None = None,
        **arguments: Any,
    ) -> PendingGeneration:
        """The first half of `generate`: what is stored of the prompt is looked up, and begins to come. Nothing is
        computed and nothing waited for but the lookup, so a prompt whose KV is on its way need not hold up another
        (`PendingGeneration.on_ready`). Hand it to `finish`, or to `cancel`."""
        return self._session.begin(GenerateCall(self.model, input_ids, arguments, segments, recompute))

    def is_stored(
        self,
        input_ids: torch.Tensor | None,
        *,
        segments: Sequence[int] | None = None,
        recompute: Recompute | None = None,
        **arguments: Any,
    ) -> bool:
        """Whether `begin`, called like this, would find anything to fetch. Raises as it does."""
        return self._session.is_stored(GenerateCall(self.model, input_ids, arguments, segments, recompute))

    def finish(self, pending: PendingGeneration) -> Any:
        """The second half of `generate`, with its result."""
        return self._session.finish(pending)

    def cancel(self, pending: PendingGeneration) -> None:
        """Nobody will finish it. Safe to call more than once, and afterwards."""
        pending.cancel()

    @torch.inference_mode()
    def question_log_probabilities(
        self, input_ids: torch.Tensor, *, segments: Sequence[int], recompute: Recompute | None = None
    ) -> torch.Tensor:
        """What the model says at each token of the last segment, f32 `[tokens, vocabulary]`, when the rest is reused as
        `generate` would, however much of it has to be computed: for measuring what reuse does to the answer. Raises
        UnsupportedModelError where segments cannot be reused, and FetchError when what is stored does not come."""
        decoder = self._engine.decoder
        if decoder is None:
            raise UnsupportedModelError(f"segments of {self.spec.model_id} cannot be reused")
        call = GenerateCall(self.model, input_ids, {}, segments, recompute)
        return decoder.log_probabilities(self._session.question_states(call))

    def __reduce_ex__(self, protocol: object) -> str:
        raise NotCopyableError(
            "a CachedModel is bound to its model's hooks and its client's connections and cannot be copied or pickled; "
            "copy or save `cached.model`, and wrap the copy: CachedModel(copy, client)"
        )

    def close(self) -> None:
        """Take the hooks off the model, and end its comparison with the canary. The client stays open."""
        self.canary.close()
        self._engine.close()
