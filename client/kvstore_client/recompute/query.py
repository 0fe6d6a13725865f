"""Tokens that the question attends to: an error there is an error in the answer."""

from collections.abc import Sequence

import torch

from kvstore_client.recompute.base import Probe, ReusedChunk, ShareOf, require_probe


class Query:
    """The attention of the question's tokens over the reused KV, averaged over layers, heads and these tokens."""

    name = "query"
    share_of: ShareOf = "prompt"
    needs_kv = True

    def scores(self, chunks: Sequence[ReusedChunk], prompt_tokens: int, probe: Probe | None) -> torch.Tensor:
        del chunks
        probe = require_probe(self, probe)
        layers = 0
        scores = torch.zeros(prompt_tokens, dtype=torch.float32, device="cpu")

        def see(weights: torch.Tensor) -> None:
            nonlocal layers, scores
            layers += 1
            heads, question_tokens, _ = weights.shape
            scores = scores.to(weights.device) + weights.sum((0, 1)) / max(heads * question_tokens, 1)

        probe.question_attention(see)
        return scores / max(layers, 1)
