"""A `generate` call of a transformers model: its arguments, and its passes over caches with reused KV."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from kvstore_client.buffers import KVBuffers
from kvstore_client.engines.transformers.bypass import bypass_reason
from kvstore_client.engines.transformers.cache import (
    arriving_cache,
    computed_values,
    empty_cache,
    make_plain,
    partial_cache,
    placed_cache,
    whole_tokens,
)
from kvstore_client.engines.transformers.first_step import with_first_step
from kvstore_client.recompute import Recompute
from kvstore_client.reuse.call import ComputedKV, EngineOutput, LayerArrives
from kvstore_client.reuse.capture import KeyCapture
from kvstore_client.settings import Budget


class GenerateCall:
    """The call `model.generate(input_ids, **arguments)`; see `EngineCall`."""

    def __init__(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor | None,
        arguments: Mapping[str, Any],
        segments: Sequence[int] | None = None,
        recompute: Recompute | None = None,
        budget: Budget | None = None,
    ) -> None:
        self._model, self._input_ids = model, input_ids
        self.segments, self.recompute, self.budget = segments, recompute, budget
        self._arguments = dict(arguments)
        if self._arguments.get("streamer") is not None:
            self._arguments["streamer"] = _PromptOnce(self._arguments["streamer"])

    @property
    def prompt_tokens(self) -> int:
        return 0 if self._input_ids is None else self._input_ids.numel()

    @property
    def tokens(self) -> torch.Tensor:
        return self._prompt[0]

    def bypass_reason(self) -> str | None:
        return bypass_reason(self._model, self._input_ids, self._arguments)

    def pass_through(self) -> Any:
        return self._model.generate(self._input_ids, **self._arguments)

    def prompt_pass(
        self,
        capture: KeyCapture,
        reused: KVBuffers | None = None,
        arrives: LayerArrives | None = None,
        left_out: int = 0,
        state: torch.Tensor | None = None,
    ) -> "GeneratePass":
        if reused is None:
            cache = empty_cache(capture, self._model.config.num_hidden_layers)
        elif left_out or state is not None:
            cache = partial_cache(reused, capture, left_out)
        elif arrives is None:
            cache = placed_cache(reused, capture)
        else:
            cache = arriving_cache(reused, capture, arrives)
        streamer = self._arguments.get("streamer")
        if streamer is not None:
            streamer.expect_prompt()
        model = self._model if state is None else with_first_step(self._model, state)
        return GeneratePass(model, self._prompt, cache, capture, self._arguments)

    @property
    def _prompt(self) -> torch.Tensor:
        if self._input_ids is None:
            raise RuntimeError("a call without token ids must run without reuse")
        return self._input_ids


class GeneratePass:
    """One run of a `generate` call over one cache; see `PromptPass`."""

    def __init__(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        cache: DynamicCache,
        capture: KeyCapture,
        arguments: Mapping[str, Any],
    ) -> None:
        self._model, self._input_ids, self._arguments = model, input_ids, arguments
        self._cache, self._capture = cache, capture
        self._is_kept = False
        """Whether the cache is returned to the caller."""

    def run(self) -> EngineOutput:
        output = self._model.generate(self._input_ids, past_key_values=self._cache, **self._arguments)
        self._is_kept = getattr(output, "past_key_values", None) is not None
        sequences = output if isinstance(output, torch.Tensor) else output.sequences
        return EngineOutput(output, sequences[0])

    def take(self, *, values: bool) -> ComputedKV:
        kept = computed_values(self._cache, self._capture.first_token) if values else ()
        computed = ComputedKV(self._cache.get_seq_length(), kept)
        if self._is_kept:
            make_plain(self._cache)
        else:
            self._cache.layers.clear()  # the buffers behind these layers are used again
        return computed

    def salvage(self) -> ComputedKV | None:
        tokens = whole_tokens(self._cache, self._capture)
        if tokens <= self._capture.first_token:
            return None
        return ComputedKV(tokens, computed_values(self._cache, self._capture.first_token))


class _PromptOnce:
    """A streamer wrapper that passes on the prompt only once, however many passes run."""

    def __init__(self, streamer: Any) -> None:
        self._streamer = streamer
        self._announced = False
        self._prompt_comes = True

    def expect_prompt(self) -> None:
        self._prompt_comes = True

    def put(self, value: torch.Tensor) -> None:
        comes, self._prompt_comes = self._prompt_comes, False
        if comes and self._announced:
            return
        self._announced = True
        self._streamer.put(value)

    def end(self) -> None:
        self._streamer.end()
