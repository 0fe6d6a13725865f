"""`CachedModel`: a transformers model that reuses KV which any worker has computed before."""

import logging
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from kvstore_client.buffers import KVBuffers
from kvstore_client.client import KVStoreClient
from kvstore_client.engines.transformers.bypass import bypass_reason
from kvstore_client.engines.transformers.cache import (
    FetchIncompleteError,
    arriving_cache,
    empty_cache,
    filled_cache,
    make_plain,
)
from kvstore_client.engines.transformers.capture import KeyCapture, install_hooks
from kvstore_client.engines.transformers.features import PromptFeatures, embedded
from kvstore_client.engines.transformers.rotary import rotary_tables
from kvstore_client.engines.transformers.spec import spec_of
from kvstore_client.fetch import Fetch, FetchReport
from kvstore_client.lookup import PrefixMatch
from kvstore_client.store import NewChunk
from kvstore_client.timeline import Timeline
from kvstore_codec.calibration import token_features
from kvstore_codec.errors import CodecError
from kvstore_codec.identity import CHUNK_TOKENS, ChunkId
from kvstore_codec.model_spec import ModelSpec
from kvstore_codec.rope import RotaryTable

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class GenerationReport:
    """What reuse did for one `generate` call."""

    prompt_tokens: int
    reused_tokens: int
    timeline: Timeline
    fetch: FetchReport | None = None
    bypassed: str | None = None
    """Why the call was passed through without reuse."""


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
        self.model = model
        self.client = client
        self.store = store
        self._model_id = model_id
        self.spec: ModelSpec = spec_of(model, model_id)
        """What names this model's chunks; made anew when the weights have changed."""
        self._weights = _weights_state(model)
        self.last_report = GenerationReport(0, 0, Timeline())
        """What the latest `generate` reused; empty before the first."""
        self._hooks = install_hooks(model)
        # MKL's first cosine in a process is off by 2e-4 in some threads when several compute it at once (seen in
        # about one start of fifteen), and the model's would be that one. One position takes one thread only.
        self._rotary(1)
        client.prepare(self.spec)
        client.buffers.reserve(model.config.max_position_embeddings * self.spec.kv_bytes_per_token)

    def generate(
        self, input_ids: torch.Tensor | None = None, generation_config: Any = None, **arguments: Any
    ) -> Any:
        """Like the model's own `generate`; reuses for `input_ids` of `[1, tokens]` and plain decoding or sampling.

        Other calls are passed on as they are, and `last_report.bypassed` says why.
        """
        if input_ids is None:
            input_ids = arguments.pop("inputs", None)
        if generation_config is not None:
            arguments["generation_config"] = generation_config
        reason = bypass_reason(self.model, input_ids, arguments) or self._renew_spec()
        if reason is not None or input_ids is None:
            self.client.metrics.missed(f"bypass_{reason}")
            self.last_report = GenerationReport(
                0 if input_ids is None else input_ids.numel(), 0, Timeline(), bypassed=reason
            )
            return self.model.generate(input_ids, **arguments)

        timeline = Timeline()
        tokens: list[int] = input_ids[0].tolist()
        ids = self.client.chunk_ids(self.spec, tokens)
        output, cache, capture, fetched = self._generate_reusing(input_ids, ids, arguments, timeline)
        reused = capture.first_token
        self.client.metrics.prompt(reused_tokens=reused, computed_tokens=len(tokens) - reused)
        self.last_report = GenerationReport(len(tokens), reused, timeline, fetched)
        if self.store and self._may_store_behind(fetched):
            sequence = output if isinstance(output, torch.Tensor) else output.sequences
            self._store_new(sequence[0, : cache.get_seq_length()].tolist(), cache, capture)
        return output

    def close(self) -> None:
        """Take the hooks off the model. The client stays open."""
        for hook in self._hooks:
            hook.remove()

    def _renew_spec(self) -> str | None:
        """Describe the model again if its weights are not those it was described with: another dtype, a merged or
        loaded adapter, a training step. Returns why it cannot be reused any more, if so."""
        state = _weights_state(self.model)
        if state != self._weights:
            try:
                self.spec = spec_of(self.model, self._model_id)
            except CodecError:
                return "model_changed"
            self._weights = state
            self.client.prepare(self.spec)
        return None

    def _generate_reusing(
        self, input_ids: torch.Tensor, ids: list[ChunkId], arguments: dict[str, Any], timeline: Timeline
    ) -> tuple[Any, DynamicCache, KeyCapture, FetchReport | None]:
        match = self.client.match(self.spec, ids, timeline)
        started = self._start_fetch(match, input_ids[0], timeline) if match.chunks else None
        if started is None:
            self.client.release(match)
            capture = self._capture(0)
            cache = empty_cache(capture, self.spec.layers)
            return *self._run(input_ids, cache, capture, arguments, timeline), None

        buffers, fetch = started
        try:
            # At least one token must pass through the model: its logits are what comes next.
            capture = self._capture(min(match.tokens, input_ids.shape[1] - 1))
            cache = arriving_cache(buffers, capture, fetch, timeline)
            return *self._run(input_ids, cache, capture, arguments, timeline), fetch.finish()
        except FetchIncompleteError:
            report = fetch.wait()
            capture = self._capture(min(report.delivered * CHUNK_TOKENS, input_ids.shape[1] - 1))
            cache = filled_cache(buffers, capture, input_ids.device)
        finally:
            fetch.finish()
            self.client.buffers.give_back(buffers)
        if arguments.get("streamer") is not None:
            arguments = arguments | {"streamer": _PromptSeen(arguments["streamer"])}
        return *self._run(input_ids, cache, capture, arguments, timeline), report

    def _start_fetch(
        self, match: PrefixMatch, tokens: torch.Tensor, timeline: Timeline
    ) -> tuple[KVBuffers, Fetch] | None:
        """None when this process has no memory or thread left for it."""
        try:
            buffers = self.client.buffers.take(self.spec, match.tokens)
            rotary, features = self._rotary(match.tokens), PromptFeatures(self.model, tokens)
            return buffers, self.client.fetch(match, buffers, rotary, timeline, features)
        except (RuntimeError, MemoryError) as error:
            log.warning("cannot fetch %d chunks: %s", len(match.chunks), error)
            self.client.metrics.missed("no_resources", len(match.chunks))
            return None

    def _capture(self, first_token: int) -> KeyCapture:
        return KeyCapture(self.spec.layers, first_token)

    def _run(
        self,
        input_ids: torch.Tensor,
        cache: DynamicCache,
        capture: KeyCapture,
        arguments: dict[str, Any],
        timeline: Timeline,
    ) -> tuple[Any, DynamicCache, KeyCapture]:
        with timeline.span("compute"), capture.active():
            output = self.model.generate(input_ids, past_key_values=cache, **arguments)
        make_plain(cache)
        return output, cache, capture

    def _rotary(self, tokens: int) -> tuple[RotaryTable, ...]:
        return rotary_tables(self.model, tokens, self.spec.dtype.torch, "cpu")

    def _may_store_behind(self, fetched: FetchReport | None) -> bool:
        """Whether what was computed is as faithful as the encoding it would be stored as says."""
        storing = self.client.store.encoding
        if fetched is None or not fetched.delivered or all(map(storing.may_follow, fetched.encodings)):
            return True
        self.client.metrics.missed("store_behind_lossy")
        return False

    def _store_new(self, tokens: list[int], cache: DynamicCache, capture: KeyCapture) -> None:
        if not capture.reaches(len(tokens)):
            self.client.metrics.missed("store_unaligned")
            return
        ids = self.client.chunk_ids(self.spec, tokens)
        first_new = -(-capture.first_token // CHUNK_TOKENS)
        if first_new >= len(ids):
            return
        # Waiting chunks must not keep a long reused prefix alive.
        begin = first_new * CHUNK_TOKENS
        values = tuple(layer.values[:, :, begin:] for layer in cache.layers)
        if 2 * begin > len(tokens):
            values = tuple(tensor.clone() for tensor in values)
        starts = range(begin, len(ids) * CHUNK_TOKENS, CHUNK_TOKENS)
        features: list[partial[torch.Tensor] | None] = [None] * len(starts)
        if self.client.store.needs_features:
            # Looked up now: the weights may have changed when the chunks' turn has come.
            rows = embedded(self.model, torch.tensor(tokens[begin : starts.stop]))
            features = [partial(token_features, chunk) for chunk in torch.split(rows, CHUNK_TOKENS)]
        self.client.store.put(
            self.spec,
            [
                NewChunk(id_, _Gather(capture, values, start, begin), chunk_features, begins_text=start == 0)
                for id_, start, chunk_features in zip(ids[first_new:], starts, features, strict=True)
            ],
        )


def _weights_state(model: PreTrainedModel) -> tuple[object, ...]:
    """Differs when a parameter was replaced, converted or written to; takes about 2 ms for SmolLM2.

    Writes past autograd (`parameter.data += delta`, as when an adapter is merged) show in no version counter, so a
    few values of every parameter are part of it.
    """
    parameters = list(model.parameters())
    samples = torch.cat([p.detach().reshape(-1)[:: max(1, p.numel() // 4)].float() for p in parameters])
    return (
        *((p.data_ptr(), 0 if p.is_inference() else p._version, p.dtype) for p in parameters),
        *samples.tolist(),
    )


@dataclass(frozen=True, slots=True)
class _Gather:
    """Brings one chunk of computed KV together, when its turn to be stored has come."""

    capture: KeyCapture
    values: tuple[torch.Tensor, ...]
    """Per layer `[1, kv_heads, tokens, head_dim]`, from position `values_begin` on."""
    begin: int
    values_begin: int

    def __call__(self) -> tuple[torch.Tensor, torch.Tensor]:
        end = self.begin + CHUNK_TOKENS
        keys = torch.stack([self.capture.keys(i, self.begin, end) for i in range(len(self.values))])
        span = slice(self.begin - self.values_begin, end - self.values_begin)
        return keys, torch.stack([values[0, :, span] for values in self.values])


class _PromptSeen:
    """A streamer for a second attempt: the prompt was announced to it by the first."""

    def __init__(self, streamer: Any) -> None:
        self._streamer = streamer
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_seen:
            self._streamer.put(value)
        self._prompt_seen = True

    def end(self) -> None:
        self._streamer.end()
