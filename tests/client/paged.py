"""Paged KV memory as engines have it: blocks of 16 tokens that lie in any order, in two layouts."""

import torch

from kvstore_client.engines.vllm.destination import PagedDestination
from kvstore_client.engines.vllm.layout import PackedLayout, RowMajorCpuLayout
from kvstore_codec.model_spec import ModelSpec

BLOCK_TOKENS = 16


class PagedKV(PagedDestination):
    """The blocks of one prompt, filled with -1.

    `packed`: keys and values of a token lie side by side. Otherwise keys are transposed, and lie before the values of
    the same block and head.
    """

    def __init__(self, spec: ModelSpec, tokens: int, *, packed: bool, seed: int = 0) -> None:
        blocks = -(-tokens // BLOCK_TOKENS)
        kind = PackedLayout if packed else RowMajorCpuLayout
        self.layout = kind(BLOCK_TOKENS, spec.kv_heads, spec.head_dim)
        self.table = torch.randperm(blocks, generator=torch.Generator().manual_seed(seed))
        """Block of the memory -> by block of the prompt."""
        shape = (spec.layers, blocks, spec.kv_heads, BLOCK_TOKENS, 2 * spec.head_dim)
        self.memory = torch.full(shape, -1.0).to(spec.dtype.torch)
        super().__init__(self.layout, tuple(self.memory), self.table)

    def contiguous(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values as KVBuffers have them."""
        layers = [self.layout.read(layer, self.table, 0, tokens) for layer in self.memory]
        keys, values = (torch.stack(kv) for kv in zip(*layers, strict=True))
        return keys, values
