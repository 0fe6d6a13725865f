"""EPIC (arXiv 2410.15332): the first tokens of each document, which became attention sinks when nothing preceded them.
A chunk in EPIC is what was prefilled separately: a document, not this project's unit of storage."""

from collections.abc import Sequence

import torch

from kvstore_client.recompute.base import Probe, ReusedChunk, ShareOf


class FirstK:
    name = "first_k"
    share_of: ShareOf = "document"
    needs_kv = False

    def scores(self, chunks: Sequence[ReusedChunk], prompt_tokens: int, probe: Probe | None) -> torch.Tensor:
        del chunks, probe
        return -torch.arange(prompt_tokens, dtype=torch.float32, device="cpu")
