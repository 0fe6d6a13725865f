"""Causal attention for tokens that are not neighbours."""

import torch
from torch.nn.functional import scaled_dot_product_attention

_BLOCK_QUERIES = 128
"""Queries that share a range of keys. On two cores, 444 of 3,236 tokens: 20 % sooner than in one call (which reads the
keys that nobody may see), and not slower than with smaller or larger blocks."""


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
        for first in range(0, len(positions), _BLOCK_QUERIES):
            block = positions[first : first + _BLOCK_QUERIES]
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
            self._blocks.append((slice(first, first + len(block)), keys, mask[None, None]))

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
        """The softmax attention of at most a block of tokens, f32 `[heads, tokens, prompt_tokens]`: zero where a key
        cannot be seen."""
        ((_, seen, mask),) = self._blocks
        heads, tokens, _ = queries.shape
        # The heads that share keys are one matrix.
        asked = queries.reshape(keys.shape[0], -1, queries.shape[2])
        products = (asked @ keys[:, seen].transpose(1, 2)).float().view(heads, tokens, -1)
        weights = products.mul_(scale).add_(mask[0, 0]).softmax(-1)
        if weights.shape[2] == keys.shape[1]:
            return weights
        whole = weights.new_zeros(heads, tokens, keys.shape[1])
        whole[:, :, seen] = weights
        return whole
