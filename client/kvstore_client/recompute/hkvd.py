"""CacheBlend (arXiv 2405.16444): the tokens whose KV another context changes most, measured at an early layer."""

from collections.abc import Sequence

import torch

from kvstore_client.recompute.base import Probe, ReusedChunk, ShareOf, positions_of, require_probe

_LAYER = 1
"""At layer 0 no token has attended to the context yet."""


class HKVD:
    """High KV deviation: the squared difference of recomputed and stored V at layer 1. Like the authors' code it
    compares only V: K's larger numbers would dominate."""

    name = "hkvd"
    share_of: ShareOf = "prompt"
    needs_kv = True

    def scores(self, chunks: Sequence[ReusedChunk], prompt_tokens: int, probe: Probe | None) -> torch.Tensor:
        probe = require_probe(self, probe)
        _, fresh = probe.fresh_kv(_LAYER)
        _, stored = probe.stored_kv(_LAYER)
        scores = torch.zeros(prompt_tokens, dtype=torch.float32, device="cpu")
        scores[positions_of(chunks)] = (fresh.float() - stored.float()).square().sum((0, 2)).cpu()
        return scores
