"""The prefix's KV in memory: what predictions are compared with, and what the baselines' files are written from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import DynamicCache, PreTrainedModel

from kvstore_bench.reprefill.prompts import Prompts, Question


class PrefixKV:
    """Prefills the prefix once."""

    @torch.inference_mode()
    def __init__(self, model: PreTrainedModel, prompts: Prompts) -> None:
        self._model = model
        self._cache = DynamicCache()
        model(prompts.prefix.unsqueeze(0), past_key_values=self._cache, logits_to_keep=1)

    @property
    def keys(self) -> Sequence[torch.Tensor]:
        """Rotated keys by layer, `[kv_heads, tokens, head_dim]`."""
        return [layer.keys[0] for layer in self._cache.layers]

    @property
    def values(self) -> Sequence[torch.Tensor]:
        return [layer.values[0] for layer in self._cache.layers]

    @torch.inference_mode()
    def log_probabilities(self, question: Question) -> torch.Tensor:
        """Predictions at the question's tokens over the whole prefix, f32 `[tokens, vocabulary]`."""
        output = self._model(question.tokens.unsqueeze(0), past_key_values=self._cache)
        self._cache.crop(-len(question.tokens))
        predicted: torch.Tensor = output.logits[0].float().log_softmax(-1)
        return predicted
