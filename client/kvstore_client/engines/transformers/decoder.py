"""Decoder layers of a Llama-family model, split into projection of keys and values and the part behind attention."""

from typing import Any

import torch
from torch.nn.functional import rms_norm
from transformers import PreTrainedModel

from kvstore_client.reuse.engine import Projected
from kvstore_client.reuse.rotation import rotated
from kvstore_codec.errors import UnsupportedModelError
from kvstore_codec.rope import RotaryTable

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


class Decoder:
    """A loaded model's layers. Uses the model's own modules; no weights are copied.

    Hidden states are `[1, tokens, hidden]`, in the model's dtype and on its device. Raises UnsupportedModelError for a
    model of a family outside FAMILIES.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        config = model.config
        if config.model_type not in FAMILIES:
            raise UnsupportedModelError(
                f"tokens of {config.model_type} models cannot be recomputed selectively; supported are "
                f"{', '.join(FAMILIES)}"
            )
        self._model = model
        devices = {parameter.device for parameter in model.parameters()}
        if len(devices) > 1 or model.device.type not in ("cpu", "cuda"):
            raise UnsupportedModelError(
                f"tokens are recomputed on a processor or one CUDA device, not on {', '.join(map(str, devices))}"
            )

    @property
    def layers(self) -> int:
        return len(self._decoder.layers)

    @property
    def device(self) -> torch.device:
        device: torch.device = self._model.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self._model.dtype
        return dtype

    @property
    def _decoder(self) -> Any:
        # In these families the module that `get_decoder` finds by searching, 184 times for a question over a part of a
        # prefix of 30 layers.
        return self._model.base_model

    def scale(self, layer: int) -> float:
        """Scale factor of the query-key products."""
        return float(self._decoder.layers[layer].self_attn.scaling)

    def window(self, layer: int) -> int | None:
        """Number of tokens, itself included, that a token of this layer attends to; None: all before it."""
        window = getattr(self._decoder.layers[layer].self_attn, "sliding_window", None)
        if window is None and self._model.config.model_type == "mistral":
            window = self._model.config.sliding_window
        return None if window is None else int(window)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Hidden states that enter layer 0, for `tokens`, i64 `[tokens]`."""
        hidden: torch.Tensor = self._decoder.embed_tokens(tokens[None])
        return hidden

    def project(self, layer: int, hidden: torch.Tensor, rotary: RotaryTable) -> Projected:
        """Queries, keys and values of `hidden`, at the positions of `rotary`."""
        module = self._decoder.layers[layer]
        attention, normed = module.self_attn, _normed(module.input_layernorm, hidden)
        queries, keys = (
            _heads(attention, name, project(normed))
            for name, project in (("q_norm", attention.q_proj), ("k_norm", attention.k_proj))
        )
        values = _heads(attention, "", attention.v_proj(normed))
        return Projected(rotated(queries, rotary), rotated(keys, rotary), values, keys)

    def queries(self, layer: int, hidden: torch.Tensor, rotary: RotaryTable) -> torch.Tensor:
        """The queries of `project` alone, rotated, `[heads, tokens, head_dim]`."""
        module = self._decoder.layers[layer]
        attention, normed = module.self_attn, _normed(module.input_layernorm, hidden)
        return rotated(_heads(attention, "q_norm", attention.q_proj(normed)), rotary)

    def finish(self, layer: int, hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """Hidden states that leave the layer, from its attention output `[heads, tokens, head_dim]`."""
        module = self._decoder.layers[layer]
        joined = attended.transpose(0, 1).reshape(1, hidden.shape[1], -1)
        hidden = hidden + module.self_attn.o_proj(joined)
        output: torch.Tensor = hidden + module.mlp(_normed(module.post_attention_layernorm, hidden))
        return output

    def log_probabilities(self, hidden: torch.Tensor) -> torch.Tensor:
        """Log-probabilities, f32 `[tokens, vocabulary]`, from the hidden states that leave the last layer."""
        head: Any = self._model.get_output_embeddings()
        logits: torch.Tensor = head(_normed(self._decoder.norm, hidden[0]))
        return logits.float().log_softmax(-1)


def _heads(attention: Any, norm: str, projected: torch.Tensor) -> torch.Tensor:
    heads = projected.view(*projected.shape[:2], -1, int(attention.head_dim))
    if hasattr(attention, norm):
        heads = getattr(attention, norm)(heads)
    return heads[0].transpose(0, 1)


def _normed(norm: Any, hidden: torch.Tensor) -> torch.Tensor:
    # One pass over the memory instead of five; bit-equal to the module on f32, and on bf16 in all measured cases.
    return rms_norm(hidden, (hidden.shape[-1],), norm.weight, norm.variance_epsilon)
