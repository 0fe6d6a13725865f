"""Key summaries: what they keep of the keys, and their bytes."""

from dataclasses import replace

import pytest
import torch

from kvstore_client.contiguous.prefix_keys import PrefixKeys
from kvstore_client.contiguous.summaries import ChunkSummary, SummaryShape
from kvstore_codec.errors import InvalidKVError
from kvstore_codec.geometry import Geometry
from tests.client.chunks import SPEC

SHAPE = SummaryShape.of(Geometry.of(SPEC))
"""Of two periods: layers 0 to 3, and 4 and 5."""
SCORED = 4


def keys(seed: int) -> list[torch.Tensor]:
    """Keys of all scored layers."""
    generator = torch.Generator().manual_seed(seed)
    shape = SPEC.kv_heads, 256, SPEC.head_dim
    return [torch.randn(shape, generator=generator) for _ in range(SCORED)]


def test_the_last_two_layers_of_each_period_are_scored() -> None:
    assert SHAPE.layers == (2, 3, 4, 5)
    assert SummaryShape.of(Geometry.of(SPEC, period_layers=1)).layers == tuple(range(SPEC.layers))
    assert SummaryShape.of(Geometry.of(SPEC, period_layers=5)).layers == (3, 4, 5)


def test_a_summary_is_the_mean_and_deviation_of_each_unit() -> None:
    layers = keys(1)
    summary = ChunkSummary.make(layers, SHAPE)
    assert summary.integers.shape == (2, SCORED, SPEC.kv_heads, 8, SPEC.head_dim)
    means, deviations = (
        torch.from_numpy(summary.integers).float() * torch.from_numpy(summary.scales)[..., None]
    )
    for number, layer in enumerate(layers):
        for unit in range(8):
            part = layer[:, unit * 32 : (unit + 1) * 32]
            torch.testing.assert_close(means[number, :, unit], part.mean(1), atol=0.01, rtol=0)
            deviation = part.std(1, correction=0)
            torch.testing.assert_close(deviations[number, :, unit], deviation, atol=0.01, rtol=0)


@pytest.mark.parametrize("head_dim", [16, 17])
def test_keys_are_told_to_about_a_tenth_of_a_deviation(head_dim: int) -> None:
    shape = replace(SHAPE, head_dim=head_dim)
    generator = torch.Generator().manual_seed(3)
    chunks = [torch.randn(SCORED, SPEC.kv_heads, 256, head_dim, generator=generator) for _ in range(2)]
    told = PrefixKeys([ChunkSummary.make([*chunk], shape) for chunk in chunks], shape)
    for place, layer in enumerate(SHAPE.layers):
        expected = torch.cat([chunk[place] for chunk in chunks], 1)
        every_channel = torch.eye(head_dim).expand(SPEC.kv_heads, -1, -1)
        found = told.best_products(layer, every_channel, frame_tokens=1)
        assert found.shape == expected.shape
        assert float((found - expected).square().mean().sqrt()) < 0.13


def test_a_frame_counts_by_its_best_key() -> None:
    told = PrefixKeys([ChunkSummary.make(keys(5), SHAPE)], SHAPE)
    queries = torch.randn(SPEC.kv_heads, 7, SPEC.head_dim, generator=torch.Generator().manual_seed(6))
    each, best = (told.best_products(3, queries, tokens) for tokens in (1, 64))
    assert each.shape == (SPEC.kv_heads, 256, 7)
    assert torch.equal(best, each.unflatten(1, (4, 64)).amax(2))


@pytest.mark.parametrize("frame_tokens", [16, 32, 64, 256])
def test_frames_of_all_sizes_have_the_same_summary(frame_tokens: int) -> None:
    assert SummaryShape.of(Geometry.of(SPEC, frame_tokens=frame_tokens)) == SHAPE


def test_a_summary_survives_its_bytes() -> None:
    summary = ChunkSummary.make(keys(2), SHAPE)
    data = summary.to_bytes()
    assert len(data) == SHAPE.size_bytes == summary.size_bytes
    again = ChunkSummary.from_bytes(data, SHAPE)
    assert (again.integers == summary.integers).all()
    assert (again.scales == summary.scales).all()
    assert (again.levels == summary.levels).all()


@pytest.mark.parametrize("data", [b"", bytes(SHAPE.size_bytes - 1), b"\xff" * SHAPE.size_bytes])
def test_other_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(InvalidKVError, match="key summary"):
        ChunkSummary.from_bytes(data, SHAPE)


def test_a_prefix_of_any_length_is_scored_like_its_parts() -> None:
    """Products are computed in blocks of chunks; the last block is shorter."""
    chunks = [ChunkSummary.make(keys(seed), SHAPE) for seed in range(19)]
    queries = torch.randn(SPEC.kv_heads, 7, SPEC.head_dim, generator=torch.Generator().manual_seed(20))
    parts = [PrefixKeys([chunk], SHAPE).best_products(3, queries, 64) for chunk in chunks]
    found = PrefixKeys(chunks, SHAPE).best_products(3, queries, 64)
    torch.testing.assert_close(found, torch.cat(parts, 1))


@pytest.mark.parametrize("count", [1, 15, 16, 17])
def test_each_query_is_scored_alone(count: int) -> None:
    """Queries are padded: the number of them changes nothing."""
    told = PrefixKeys([ChunkSummary.make(keys(21), SHAPE)], SHAPE)
    queries = torch.randn(SPEC.kv_heads, 40, SPEC.head_dim, generator=torch.Generator().manual_seed(22))
    found = told.best_products(3, queries[:, :count], 16)
    assert found.shape == (SPEC.kv_heads, 16, count)
    torch.testing.assert_close(found, told.best_products(3, queries, 16)[:, :, :count])
