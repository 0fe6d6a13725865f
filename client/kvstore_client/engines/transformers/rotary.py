"""Rotary tables of a loaded model."""

import torch
from transformers import PreTrainedModel

from kvstore_codec.rope import RotaryTable


def rotary_tables(
    model: PreTrainedModel, tokens: int, dtype: torch.dtype, device: torch.device | str
) -> tuple[RotaryTable, ...]:
    """Rotary table of each layer for positions from 0 on, in the model's own `dtype`. Equal layers share one table."""
    rotary = model.get_decoder().rotary_emb
    probe = torch.empty(0, dtype=dtype, device=model.device)
    positions = torch.arange(tokens, device=model.device).unsqueeze(0)
    kinds = _rope_kinds(model)
    tables = {}
    for kind in dict.fromkeys(kinds):
        cos, sin = rotary(probe, positions, *kind)
        tables[kind] = RotaryTable(cos[0].to(device), sin[0].to(device))
    return tuple(tables[kind] for kind in kinds)


def inverse_frequencies(model: PreTrainedModel) -> torch.Tensor:
    """Inverse frequencies of RoPE, radians per token, `[layers, rotary_dim / 2]`."""
    rotary = model.get_decoder().rotary_emb
    return torch.stack([getattr(rotary, "_".join((*kind, "inv_freq"))) for kind in _rope_kinds(model)])


def _rope_kinds(model: PreTrainedModel) -> list[tuple[str, ...]]:
    """Arguments, besides positions, of the model's rotary embedding for each layer: none, or in Gemma 3 the layer
    type."""
    if hasattr(model.get_decoder().rotary_emb, "layer_types"):
        return [(layer_type,) for layer_type in model.config.layer_types]
    return [()] * model.config.num_hidden_layers
