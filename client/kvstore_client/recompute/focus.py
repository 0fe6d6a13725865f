"""`focus`, the default: tokens that single tokens of the question attend to strongly."""

from collections.abc import Sequence

import torch

from kvstore_client.recompute.base import Probe, ReusedChunk, ShareOf, require_probe

_EVERY = 3
"""Distance of the layers whose attention is used; of SmolLM2's 30 layers, ten select like all."""


class Focus:
    """The question's attention over the reused KV, squared, summed over its tokens and the heads of every third layer.

    Like `query`, but squared: a head that attends to one token alone counts more than many that attend to it weakly.
    The KL grows with the square of an error.
    """

    name = "focus"
    share_of: ShareOf = "prompt"
    needs_kv = True

    def scores(self, chunks: Sequence[ReusedChunk], prompt_tokens: int, probe: Probe | None) -> torch.Tensor:
        del chunks
        total = torch.zeros(prompt_tokens, dtype=torch.float32, device="cpu")

        def add(weights: torch.Tensor) -> None:
            for head in weights:  # one at a time: all of them together are large
                total.add_(head.square().sum(0).cpu())

        require_probe(self, probe).question_attention(add, every=_EVERY)
        return total
