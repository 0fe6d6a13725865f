"""What vLLM's blocks should hold, as transformers computes it."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import LlamaForCausalLM


class Reference:
    """Recomputes KV of a checkpoint in float32."""

    def __init__(self, model: Path) -> None:
        self._model = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32)

    @torch.inference_mode()
    def kv(self, tokens: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys after RoPE and values, `[layers, kv_heads, tokens, head_dim]` each."""
        cache = self._model(torch.tensor([list(tokens)]), use_cache=True, logits_to_keep=1).past_key_values
        keys = torch.stack([layer.keys[0] for layer in cache.layers])
        return keys, torch.stack([layer.values[0] for layer in cache.layers])
