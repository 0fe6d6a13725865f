"""CacheTune (arXiv 2605.24022): the tokens that keep most energy behind a low-pass filter along the text.

The order of tokens is computed when a chunk is stored, from the chunk alone, and stored with it. The tokens of any
ratio are a prefix of this order, and need not be fetched.
"""

import logging
import math
from collections.abc import Sequence
from typing import Literal

import torch

from kvstore_client.recompute.base import Probe, ReusedChunk, ShareOf
from kvstore_codec.token_order import TokenOrder

_log = logging.getLogger(__name__)

ALPHA = 0.5
"""Share of the spectrum that counts as low, as in the paper."""


def token_order(keys: torch.Tensor, values: torch.Tensor, alpha: float = ALPHA) -> TokenOrder:
    """Order of a chunk's tokens, from keys (before RoPE) and values, both `[layers, kv_heads, tokens, head_dim]`."""
    return order_of(band_energies(keys, values, alpha))


def band_energies(keys: torch.Tensor, values: torch.Tensor, alpha: float = ALPHA) -> torch.Tensor:
    """Energies f32 `[low and high, K and V, layers, tokens]`: each token's squared norm over the given heads and
    head_dim, behind a filter that keeps the first floor(alpha * (tokens // 2 + 1)) frequencies, and behind its
    complement.

    Under tensor parallelism each rank has some of the heads: the sum over the ranks gives the energies of all heads.
    """
    layers, _, tokens, _ = keys.shape
    kept = math.floor(alpha * (tokens // 2 + 1))
    energies = torch.empty((2, 2, layers, tokens), dtype=torch.float32, device=keys.device)
    for layer in range(layers):  # scratch memory for one layer at a time
        for kind, tensor in enumerate((keys[layer], values[layer])):
            whole = tensor.float()
            spectrum = torch.fft.rfft(whole, dim=1)
            spectrum[:, kept:] = 0
            low = torch.fft.irfft(spectrum, n=tokens, dim=1)
            energies[0, kind, layer] = low.square().sum((0, 2))
            energies[1, kind, layer] = (whole - low).square_().sum((0, 2))
    return energies


def order_of(energies: torch.Tensor) -> TokenOrder:
    """Order of tokens from the `band_energies` of all heads. A token's score is (|K| + |V|) / 2, as a share of its
    layer, averaged over the layers; equal scores are ordered by index."""
    norms = energies.cpu().double().sqrt().mean(1)
    shares = norms / norms.sum(-1, keepdim=True).clamp_min(torch.finfo(norms.dtype).tiny)
    low, high = shares.mean(1).sort(dim=-1, descending=True, stable=True).indices.tolist()
    return TokenOrder(tuple(low), tuple(high))


class Frequency:
    """The stored order. The first tokens of a chunk stored without one are recomputed."""

    share_of: ShareOf = "chunk"
    needs_kv = False

    def __init__(self, band: Literal["low", "high"] = "low") -> None:
        self._band: Literal["low", "high"] = band
        self.name = "frequency" if band == "low" else "frequency-high"
        self._warned = False

    def scores(self, chunks: Sequence[ReusedChunk], prompt_tokens: int, probe: Probe | None) -> torch.Tensor:
        del probe
        scores = torch.zeros(prompt_tokens, dtype=torch.float32, device="cpu")
        missing = 0
        for chunk in chunks:
            if chunk.order is not None:
                best_first = torch.tensor(
                    chunk.order.low if self._band == "low" else chunk.order.high,
                    dtype=torch.int64,
                    device="cpu",
                )
                scores[chunk.tokens.start + best_first] = torch.arange(
                    len(best_first), 0, -1, dtype=torch.float32, device="cpu"
                )
            elif not chunk.exact:
                missing += 1
        if missing and not self._warned:
            self._warned = True
            _log.warning(
                "%d of %d reused chunks were stored without the order of tokens that selector %s uses; their first "
                "tokens are recomputed. Workers with KVSTORE_RECOMPUTE_SELECTOR=%s store it.",
                missing, len(chunks), self.name, self.name,
            )  # fmt: skip
        return scores
