"""Rotary position embedding of stored keys (RoFormer, arXiv 2104.09864, eq. 34).

Keys are stored before RoPE, so a chunk can be used at any position. Restoring a chunk applies the rotation.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch


@dataclass(frozen=True, slots=True)
class RotaryTable:
    """cos and sin for consecutive positions, `[tokens, rotary_dim]` each, in the dtype in which the model rotates."""

    cos: torch.Tensor
    sin: torch.Tensor

    def at(self, tokens: slice) -> "RotaryTable":
        return RotaryTable(self.cos[tokens], self.sin[tokens])


_AT_ONCE = 1 << 18
"""Number of values rotated at once, 1 MiB in float32, so that they and the scratch memory stay in the cache."""


def rotate_(keys: torch.Tensor, table: RotaryTable) -> None:
    """Rotate `keys` in place.

    `keys` is `[..., tokens, head_dim]` with any strides. The first `rotary_dim` channels of each head are rotated
    as two halves; the others are unchanged. Each product and the sum round in the tensor's own dtype and in the same
    order as Llama-family models of transformers (`k * cos + rotate_half(k) * sin`), so the result is bit-equal.
    """
    if keys.is_cpu and keys.dim() > 2 and keys.numel() > _AT_ONCE:
        for part in keys:
            rotate_(part, table)
        return
    half = table.cos.shape[-1] // 2
    first, second = keys[..., :half], keys[..., half : 2 * half]
    first_sin = first * table.sin[:, half:]
    second_sin = second * table.sin[:, :half]
    first.mul_(table.cos[:, :half]).sub_(second_sin)
    second.mul_(table.cos[:, half:]).add_(first_sin)


def rotate_layers_(keys: torch.Tensor, tables: Sequence[RotaryTable], tokens: slice) -> None:
    """Rotate `keys`, `[layers, kv_heads, tokens, head_dim]`, in place. Each layer uses its own table, at the rows
    `tokens`. Consecutive layers that share a table are rotated together."""
    first = 0
    for _, alike in groupby(tables, key=id):
        end = first + sum(1 for _ in alike)
        rotate_(keys[first:end], tables[first].at(tokens))
        first = end
