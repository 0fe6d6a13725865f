"""The tokens that CacheTune's filter leaves most of, and the order in which they are stored."""

import itertools
import logging
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore_client.recompute import ReusedChunk, select, token_order
from kvstore_client.recompute.frequency import Frequency, band_energies, order_of
from kvstore_codec.token_order import TokenOrder

Scores = tuple[list[float], list[float]]


def noise(layers: int, heads: int, tokens: int, dim: int, seed: int = 0) -> torch.Tensor:
    """K and V with a mean of their own for each channel, `[2, layers, heads, tokens, dim]`."""
    generator = torch.Generator().manual_seed(seed)
    means = 2 * torch.randn((2, layers, heads, 1, dim), generator=generator)
    return means + torch.randn((2, layers, heads, tokens, dim), generator=generator)


def published_scores(keys: np.ndarray, values: np.ndarray, alpha: float) -> Scores:
    """As the paper writes it, number by number and without a fast transform: the discrete Fourier sum over tokens, the
    first floor(alpha * (N // 2 + 1)) bins of the half spectrum kept with their mirror images, and back."""
    layers, heads, tokens, dim = keys.shape
    kept = math.floor(alpha * (tokens // 2 + 1))
    n = np.arange(tokens)
    scores = (np.zeros(tokens), np.zeros(tokens))
    for layer in range(layers):
        norms = np.zeros((2, 2, tokens))
        for kind, tensor in enumerate((keys, values)):
            for head in range(heads):
                for channel in range(dim):
                    x = tensor[layer, head, :, channel].astype(np.float64)
                    low = np.zeros(tokens)
                    for k in range(kept):
                        coefficient = (x * np.exp(-2j * np.pi * k * n / tokens)).sum()
                        mirrored = 1 if k == 0 or 2 * k == tokens else 2
                        low += mirrored * (coefficient * np.exp(2j * np.pi * k * n / tokens)).real / tokens
                    norms[0, kind] += low**2
                    norms[1, kind] += (x - low) ** 2
        for band in range(2):
            score = (np.sqrt(norms[band, 0]) + np.sqrt(norms[band, 1])) / 2
            if score.any():  # else this layer says nothing
                scores[band][:] += score / score.sum() / layers
    return scores[0].tolist(), scores[1].tolist()


def assert_ordered_by(order: tuple[int, ...], scores: list[float]) -> None:
    """A permutation in which no token comes before one that is clearly better: sums of 32 bits differ in the last."""
    assert sorted(order) == list(range(len(scores)))
    ranked = [scores[token] for token in order]
    assert all(a >= b * (1 - 1e-6) for a, b in itertools.pairwise(ranked))


@pytest.mark.parametrize("tokens", [2, 3, 8, 31, 64])
@pytest.mark.parametrize("alpha", [0.5, 0.3, 1.0])
def test_as_published(tokens: int, alpha: float) -> None:
    keys, values = noise(2, 2, tokens, 3, seed=tokens)
    order = token_order(keys, values, alpha)
    low, high = published_scores(keys.numpy(), values.numpy(), alpha)
    assert_ordered_by(order.low, low)
    if alpha < 1:  # else nothing is left of the high band
        assert_ordered_by(order.high, high)


def test_low_and_high_find_what_they_are_called_after() -> None:
    n = torch.arange(64)
    channels = torch.zeros(2, 1, 1, 64, 2)
    channels[..., 0] = torch.exp(-((n - 20) ** 2) / 50.0)  # a slow bump around token 20
    channels[..., 1] = 0.5 * (-1.0) ** n * torch.exp(-((n - 50) ** 2) / 50.0)  # a quick one around 50
    order = token_order(*channels)
    assert order.low[0] == 20
    assert order.high[0] == 50


def test_each_layer_counts_alike() -> None:
    """However large its numbers are."""
    keys, values = noise(2, 1, 32, 4)
    scaled = torch.stack([keys[0], 1000 * keys[1]]), torch.stack([values[0], 1000 * values[1]])
    assert token_order(*scaled) == token_order(keys, values)


def test_equal_tokens_stay_in_order() -> None:
    same = torch.ones(2, 3, 2, 40, 4)
    assert token_order(*same).low == tuple(range(40))


@pytest.mark.parametrize("kv", [torch.zeros(2, 2, 1, 16, 4), torch.ones(2, 2, 1, 1, 4)])
def test_where_nothing_is_left_the_first_come_first(kv: torch.Tensor) -> None:
    order = token_order(*kv)
    assert order.low == order.high == tuple(range(kv.shape[3]))


def test_of_any_dtype_and_strides() -> None:
    kv = noise(2, 2, 32, 4).to(torch.bfloat16)
    strided = kv.permute(0, 3, 1, 4, 2).contiguous().permute(0, 2, 4, 1, 3)
    assert not strided[0].is_contiguous()
    assert token_order(*strided) == token_order(*kv.float())


@pytest.mark.parametrize("split", [1, 2, 3])
def test_ranks_sum_to_the_whole(split: int) -> None:
    """Under tensor parallelism; an average of the ranks' own scores would give another order."""
    keys, values = noise(4, 4, 256, 16)
    keys[:, split:] *= 5  # heads are not alike
    ranks = [(keys[:, :split], values[:, :split]), (keys[:, split:], values[:, split:])]
    energies = [band_energies(*rank) for rank in ranks]
    torch.testing.assert_close(sum(energies), band_energies(keys, values))
    together = order_of(energies[0] + energies[1])
    low, high = published_shares(keys, values)
    assert_ordered_by(together.low, low)
    assert_ordered_by(together.high, high)
    assert order_of(energies[0]) != together != order_of(energies[1])


def published_shares(keys: torch.Tensor, values: torch.Tensor) -> Scores:
    """`published_scores` of larger tensors, with numpy's transform in 64 bits."""
    norms = []
    for tensor in (keys, values):
        x = tensor.double().numpy()
        spectrum = np.fft.rfft(x, axis=2)
        spectrum[:, :, spectrum.shape[2] // 2 :] = 0
        low = np.fft.irfft(spectrum, n=x.shape[2], axis=2)
        norms.append([np.sqrt((part**2).sum((1, 3))) for part in (low, x - low)])
    bands = [(norms[0][band] + norms[1][band]) / 2 for band in range(2)]
    low_scores, high_scores = ((band / band.sum(-1, keepdims=True)).mean(0).tolist() for band in bands)
    return low_scores, high_scores


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 256), st.floats(0, 1), st.sampled_from(["low", "high"]), st.integers(0, 1000), st.randoms()
)
def test_any_ratio_is_a_prefix(tokens: int, ratio: float, band: str, first: int, random: object) -> None:
    """What is computed at a ratio is the order's beginning, so what a smaller ratio computes is part of it."""
    order = token_order(*noise(1, 1, tokens, 2, seed=tokens))
    chunk = ReusedChunk(range(first, first + tokens), exact=False, order=order)
    chosen = select(Frequency(band), [chunk], first + tokens + 3, ratio)  # type: ignore[arg-type]
    budget = math.floor(ratio * tokens + 1e-9)
    assert sorted(getattr(order, band)[:budget]) == (chosen - first).tolist()


def test_an_order_that_ends_early_goes_on_with_the_first_tokens() -> None:
    chunk = ReusedChunk(range(10, 20), exact=False, order=TokenOrder((7, 2), ()))
    assert select(Frequency("low"), [chunk], 30, 0.1).tolist() == [17]
    assert select(Frequency("low"), [chunk], 30, 0.4).tolist() == [10, 11, 12, 17]
    assert select(Frequency("high"), [chunk], 30, 0.2).tolist() == [10, 11]


def test_without_an_order_the_first_tokens_are_computed_and_it_is_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    selector = Frequency("low")
    chunks = [
        ReusedChunk(range(10), exact=True),
        ReusedChunk(range(10, 20), exact=False),
        ReusedChunk(range(20, 30), exact=False, order=TokenOrder((9, 8, 7), ())),
    ]
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert select(selector, chunks, 40, 0.2).tolist() == [10, 11, 28, 29]
    assert [record.getMessage()[:20] for record in caplog.records] == ["1 of 3 reused chunks"]
