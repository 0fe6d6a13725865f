"""EPIC (arXiv 2410.15332): the first tokens of each chunk, which took too much attention where nothing stood before."""

from collections.abc import Sequence

import torch

from kvstore_client.recompute.base import Probe, ReusedChunk


class FirstK:
    name = "first_k"
    per_chunk = True
    needs_kv = False

    def scores(self, chunks: Sequence[ReusedChunk], prompt_tokens: int, probe: Probe | None) -> torch.Tensor:
        del chunks, probe
        return -torch.arange(prompt_tokens, dtype=torch.float32)
