"""Paged KV memory as engines have it: blocks of 16 tokens that lie in any order, in two layouts."""

import torch

from kvstore_codec.model_spec import ModelSpec

BLOCK_TOKENS = 16


class PagedKV:
    """A `Destination` in host memory.

    `packed`: `[layers, blocks, kv_heads, 16, 2 * head_dim]`, keys before values. Otherwise keys are transposed,
    `[layers, blocks, kv_heads, head_dim, 16]`, and values are `[layers, blocks, kv_heads, 16, head_dim]`.
    """

    def __init__(self, spec: ModelSpec, tokens: int, *, packed: bool, seed: int = 0) -> None:
        blocks = -(-tokens // BLOCK_TOKENS)
        self.spec = spec
        self.table = torch.randperm(blocks, generator=torch.Generator().manual_seed(seed))
        """Block of the memory -> by block of the prompt."""
        shape = (spec.layers, blocks, spec.kv_heads)
        if packed:
            memory = torch.full((*shape, BLOCK_TOKENS, 2 * spec.head_dim), -1.0).to(spec.dtype.torch)
            self._keys, self._values = memory.split(spec.head_dim, dim=-1)
        else:
            transposed = torch.full((*shape, spec.head_dim, BLOCK_TOKENS), -1.0).to(spec.dtype.torch)
            self._keys = transposed.transpose(-1, -2)
            self._values = torch.full((*shape, BLOCK_TOKENS, spec.head_dim), -1.0).to(spec.dtype.torch)

    @property
    def layers(self) -> int:
        return self.spec.layers

    def prepare(self, layers: slice, tokens: slice) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (
            layers.stop - layers.start,
            self.spec.kv_heads,
            tokens.stop - tokens.start,
            self.spec.head_dim,
        )
        dtype = self.spec.dtype.torch
        return torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype)

    def complete(self, layers: slice, tokens: slice, keys: torch.Tensor, values: torch.Tensor) -> None:
        first = tokens.start
        while first < tokens.stop:
            block, inside = divmod(first, BLOCK_TOKENS)
            end = min(first - inside + BLOCK_TOKENS, tokens.stop)
            here, there = slice(first - tokens.start, end - tokens.start), slice(inside, inside + end - first)
            self._keys[layers, self.table[block], :, there] = keys[:, :, here]
            self._values[layers, self.table[block], :, there] = values[:, :, here]
            first = end

    def contiguous(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values as KVBuffers have them."""
        keys, values = (
            paged[:, self.table].transpose(1, 2).flatten(2, 3)[:, :, :tokens]
            for paged in (self._keys, self._values)
        )
        return keys, values
