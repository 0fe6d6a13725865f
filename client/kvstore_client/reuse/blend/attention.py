"""Causal attention for tokens that are not neighbours."""

import itertools
from collections.abc import Iterator

import torch
from torch.nn.functional import scaled_dot_product_attention

_BLOCK_QUERIES = 64
"""Queries that share a range of keys. On two cores, 444 of 3,236 tokens: 20 % (bf16) to 30 % (f32) sooner than in one
call, which reads the keys that nobody may see, and not slower than with smaller or larger blocks."""
_FAR_TOKENS = 1024
"""From one token to the next: a new block is worth its call."""


class CausalBlocks:
    """Which keys the tokens at `positions` (i64, ascending) of a prompt may see: those at their own position or before
    it, at most `window` positions back, and of `hidden` (bool `[prompt_tokens]`) none.

    Positions are absolute, not counted from the end: a mask that is triangular at its lower right would let a token in
    the middle of the prompt see what comes after it. Made once for all layers with the same window.
    """

    def __init__(
        self,
        positions: torch.Tensor,
        dtype: torch.dtype,
        *,
        window: int | None = None,
        hidden: torch.Tensor | None = None,
    ) -> None:
        self._blocks: list[tuple[slice, slice, torch.Tensor]] = []
        for first, end in _blocks(positions):
            block = positions[first:end]
            begin = 0 if window is None else max(0, int(block[0]) - window + 1)
            keys = slice(begin, int(block[-1]) + 1)
            at = torch.arange(keys.start, keys.stop, device=positions.device)
            unseen = at > block[:, None]
            if window is not None:
                unseen |= at <= block[:, None] - window
            if hidden is not None:
                unseen |= hidden[keys]
            mask = torch.zeros(unseen.shape, dtype=dtype, device=positions.device)
            mask.masked_fill_(unseen, float("-inf"))
            self._blocks.append((slice(first, end), keys, mask[None, None]))

    def attend(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """`[heads, tokens, head_dim]`, of as many `queries`, over `keys` and `values` of the whole prompt,
        `[kv_heads, prompt_tokens, head_dim]`."""
        output = torch.empty_like(queries)
        for block, seen, mask in self._blocks:
            output[:, block] = scaled_dot_product_attention(
                queries[None, :, block], keys[None, :, seen], values[None, :, seen], mask,
                scale=scale, enable_gqa=True,
            )[0]  # fmt: skip
        return output

    def weights(self, queries: torch.Tensor, keys: torch.Tensor, scale: float) -> torch.Tensor:
        """The softmax attention of the tokens, f32 `[heads, tokens, prompt_tokens]`: zero where a key cannot be seen.
        Not for many: all of it is in memory at once."""
        heads, kv_heads, total = queries.shape[0], *keys.shape[:2]
        weights = torch.zeros(heads, queries.shape[1], total, dtype=torch.float32, device=keys.device)
        for block, seen, mask in self._blocks:
            tokens = block.stop - block.start
            asked = queries[:, block].reshape(
                kv_heads, -1, queries.shape[2]
            )  # those that share keys are one matrix
            products = (asked @ keys[:, seen].transpose(1, 2)).float().view(heads, tokens, -1)
            weights[:, block, seen] = products.mul_(scale).add_(mask[0, 0]).softmax(-1)
        return weights


def _blocks(positions: torch.Tensor) -> Iterator[tuple[int, int]]:
    far = (positions.diff() > _FAR_TOKENS).nonzero().flatten() + 1
    borders = [0, *far.tolist(), len(positions)]
    for begin, end in itertools.pairwise(borders):
        for first in range(begin, end, _BLOCK_QUERIES):
            yield first, min(first + _BLOCK_QUERIES, end)
