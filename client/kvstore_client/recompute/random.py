"""Random tokens: the baseline for all selectors."""

from collections.abc import Sequence

import torch

from kvstore_client.recompute.base import Probe, ReusedChunk, ShareOf
from kvstore_codec import canonical

_DOMAIN = b"kvstore.recompute.random.v1"


class Random:
    """Random but reproducible: the same text gets the same tokens, wherever and whenever it is reused."""

    name = "random"
    share_of: ShareOf = "prompt"
    needs_kv = False

    def scores(self, chunks: Sequence[ReusedChunk], prompt_tokens: int, probe: Probe | None) -> torch.Tensor:
        del probe
        scores = torch.zeros(prompt_tokens, dtype=torch.float32, device="cpu")
        for chunk in chunks:
            digest = canonical.digest(_DOMAIN, chunk.content_id, canonical.integer(len(chunk.tokens)))
            generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:7], "little"))
            scores[chunk.tokens.start : chunk.tokens.stop] = torch.rand(
                len(chunk.tokens), generator=generator, dtype=torch.float32, device="cpu"
            )
        return scores
