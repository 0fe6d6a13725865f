"""How much attention a question pays to each frame of a prefix, and what frames are chosen by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from kvstore_client.contiguous.prefix_keys import PrefixKeys


@dataclass(frozen=True, slots=True)
class FrameScores:
    """What the queries of one or more layers are expected to pay to each frame, f32 `[frames]` each."""

    attention: torch.Tensor
    """Share of the attention to the prefix, mean over query tokens and heads; sums to 1."""
    rank: torch.Tensor
    """What frames are chosen by: the largest share that any head pays at any token of the question. So a frame that a
    single head looks for counts, whatever the others look at."""

    @classmethod
    def of_layers(cls, layers: Sequence[FrameScores]) -> FrameScores:
        """Scores of several layers together."""
        attention = torch.stack([one.attention for one in layers]).mean(0)
        return cls(attention, torch.stack([one.rank for one in layers]).amax(0))


Scorer = Callable[[int, torch.Tensor, float], FrameScores]
"""Scores all frames: takes a layer, the question's rotated queries in that layer `[heads, tokens, head_dim]`, and the
scale of query-key products."""


class SummaryScorer:
    """Scores frames by a question's attention to the keys as their summaries tell them; a `Scorer`."""

    def __init__(self, keys: PrefixKeys, frame_tokens: int) -> None:
        self._keys, self._frame_tokens = keys, frame_tokens

    def __call__(self, layer: int, queries: torch.Tensor, scale: float) -> FrameScores:
        # Query heads count with their own KV head (GQA).
        asked = queries.float().reshape(self._keys.shape.kv_heads, -1, queries.shape[-1]) * scale
        return scores_of(self._keys.best_products(layer, asked, self._frame_tokens))


def scores_of(products: torch.Tensor) -> FrameScores:
    """Scores of frames from the scaled product of each query with the best key of each frame, f32
    `[kv_heads, frames, queries]`.

    A frame counts by its best key, not by the sum over its keys: the exponentials of all products take as long as the
    products, and where a frame matters, one of its keys stands out.
    """
    shares = products.softmax(1)
    return FrameScores(shares.mean((0, 2)), shares.amax((0, 2)))
