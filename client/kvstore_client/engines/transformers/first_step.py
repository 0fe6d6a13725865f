"""Answers whose first token needs no pass through the model, because its hidden state was computed before."""

from functools import lru_cache, wraps
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from kvstore_client.engines.transformers.cache import PlacedLayer


def with_first_step(model: PreTrainedModel, state: torch.Tensor) -> PreTrainedModel:
    """The same model, to be called by one `generate`: its first forward pass, of the prompt's last token, returns the
    logits of `state`, the hidden state that leaves the last layer, `[1, 1, hidden]`. The token's KV must be in the
    cache's buffers already, and the pass only counts it in.

    The result shares everything with the model, which stays as it is. For models of the decoder families only.
    """
    plain: Any = type(model)
    same: PreTrainedModel = object.__new__(_answering(plain))
    same.__dict__ = model.__dict__
    object.__setattr__(same, "_given", [state])  # in the slot, not among the model's own attributes
    return same


@lru_cache(maxsize=8)
def _answering(plain: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The class of models whose first forward pass is given. Made once: transformers takes milliseconds for a class."""

    class Answering(plain):  # type: ignore[misc]
        __slots__ = ("_given",)

        @wraps(plain.forward)
        def forward(self, *arguments: Any, **options: Any) -> Any:
            if not self._given:
                return super().forward(*arguments, **options)
            cache: Cache = options["past_key_values"]
            for layer in cache.layers:
                if not isinstance(layer, PlacedLayer):
                    raise TypeError(
                        f"the KV of a computed token is in buffers, not in a {type(layer).__name__}"
                    )
                layer.advance(1)
            logits = self.get_output_embeddings()(self.get_decoder().norm(self._given.pop()))
            return CausalLMOutputWithPast(logits=logits, past_key_values=cache)

    Answering.__name__, Answering.__qualname__ = plain.__name__, plain.__qualname__
    return Answering
