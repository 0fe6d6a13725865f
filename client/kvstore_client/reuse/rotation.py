"""Rotation of keys and queries to their positions, and its inverse."""

import torch

from kvstore_codec.rope import RotaryTable, rotate_


def rotated(heads: torch.Tensor, rotary: RotaryTable) -> torch.Tensor:
    """Rotate `[..., tokens, head_dim]` to the tokens' positions (RoFormer, eq. 34), rounded like transformers."""
    turned = heads.clone(memory_format=torch.contiguous_format)
    rotate_(turned, rotary)
    return turned


def half_turned(heads: torch.Tensor) -> torch.Tensor:
    """Rotate `[..., head_dim]` by a right angle."""
    half = heads.shape[-1] // 2
    return torch.cat((-heads[..., half:], heads[..., :half]), dim=-1)


def turned_back(heads: torch.Tensor, rotary: RotaryTable) -> torch.Tensor:
    """The inverse of `rotated`, up to rounding."""
    return rotated(heads, RotaryTable(rotary.cos, -rotary.sin))
