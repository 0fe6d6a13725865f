"""Synthetic KV whose statistics are known."""

from dataclasses import dataclass

import torch

LAYERS, PERIOD, HEADS, DIM, FEATURES, RANK = 3, 2, 2, 4, 6, 2


@dataclass
class Text:
    keys: torch.Tensor
    values: torch.Tensor
    features: torch.Tensor


def weights(seed: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the predictor that every text obeys: keys' and values', `[layers, heads, dim, features]`, rank 2."""
    generator = torch.Generator().manual_seed(seed)
    size = 2 * LAYERS * HEADS * DIM
    full = torch.randn(size, RANK, generator=generator) @ torch.randn(RANK, FEATURES, generator=generator)
    keys, values = full.reshape(2, LAYERS, HEADS, DIM, FEATURES)
    return keys, values


def text(tokens: int, seed: int, noise: float = 0.1, bias: float = 30.0) -> Text:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(tokens, FEATURES, generator=generator) + 0.5
    keys, values = (
        torch.einsum("lhdf,tf->lhtd", w, features)
        + bias
        + noise * torch.randn(LAYERS, HEADS, tokens, DIM, generator=generator)
        for w in weights()
    )
    return Text(keys, values, features)


def identity() -> torch.Tensor:
    return torch.eye(DIM, dtype=torch.float64).expand(LAYERS, 2, HEADS, DIM, DIM)


def random_whitening(seed: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(LAYERS, 2, HEADS, DIM, DIM, generator=generator, dtype=torch.float64)
    return root @ root.transpose(-1, -2) / DIM + 0.3 * torch.eye(DIM, dtype=torch.float64)
