"""Key summaries: what they keep of the keys, their bytes, and the scores that they give."""

import pytest
import torch

from kvstore_client.contiguous.summaries import (
    ChunkSummary,
    SummaryScorer,
    SummaryShape,
    attention_shares,
)
from kvstore_codec.errors import InvalidKVError
from kvstore_codec.geometry import Geometry
from tests.client.chunks import SPEC

SHAPE = SummaryShape.of(Geometry.of(SPEC))


def keys(seed: int) -> list[torch.Tensor]:
    """Keys of the first layers of both periods."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(SPEC.kv_heads, 256, SPEC.head_dim, generator=generator) for _ in range(2)]


def test_a_summary_is_the_mean_and_deviation_of_each_unit() -> None:
    first_layers = keys(1)
    summary = ChunkSummary.make(first_layers, SHAPE)
    assert summary.integers.shape == (2, 2, SPEC.kv_heads, 8, SPEC.head_dim)
    means, deviations = (
        torch.from_numpy(summary.integers).float() * torch.from_numpy(summary.scales)[..., None]
    )
    for period, layer in enumerate(first_layers):
        for unit in range(8):
            part = layer[:, unit * 32 : (unit + 1) * 32]
            torch.testing.assert_close(means[period, :, unit], part.mean(1), atol=0.01, rtol=0)
            deviation = part.std(1, correction=0)
            torch.testing.assert_close(deviations[period, :, unit], deviation, atol=0.01, rtol=0)


@pytest.mark.parametrize(("frame_tokens", "unit"), [(16, 16), (32, 32), (64, 32), (256, 32)])
def test_a_unit_is_never_larger_than_a_frame(frame_tokens: int, unit: int) -> None:
    shape = SummaryShape.of(Geometry.of(SPEC, frame_tokens=frame_tokens))
    assert (shape.unit_tokens, shape.units) == (unit, 256 // unit)


def test_a_summary_survives_its_bytes() -> None:
    summary = ChunkSummary.make(keys(2), SHAPE)
    data = summary.to_bytes()
    assert len(data) == SHAPE.size_bytes == summary.size_bytes
    again = ChunkSummary.from_bytes(data, SHAPE)
    assert (again.integers == summary.integers).all()
    assert (again.scales == summary.scales).all()


@pytest.mark.parametrize("data", [b"", bytes(SHAPE.size_bytes - 1), b"\xff" * SHAPE.size_bytes])
def test_other_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(InvalidKVError, match="key summary"):
        ChunkSummary.from_bytes(data, SHAPE)


def test_keys_of_zero_can_be_summarised() -> None:
    summary = ChunkSummary.make([torch.zeros(SPEC.kv_heads, 256, SPEC.head_dim)] * 2, SHAPE)
    scorer = SummaryScorer([summary], 64, SHAPE)
    shares = scorer(1, torch.randn(4, 3, SPEC.head_dim), 0.25)
    torch.testing.assert_close(shares, torch.full((4,), 0.25))


def test_the_attended_frame_scores_highest() -> None:
    asked = torch.randn(SPEC.head_dim, generator=torch.Generator().manual_seed(3))
    chunks = [keys(4), keys(5)]
    chunks[1][1][:, 128:192] += 0.5 * asked  # frame 6 of the second period
    scorer = SummaryScorer([ChunkSummary.make(chunk, SHAPE) for chunk in chunks], 64, SHAPE)
    queries = asked.expand(4, 3, -1)
    shares = scorer(1, queries, SPEC.head_dim**-0.5)
    assert shares.shape == (8,)
    assert int(shares.argmax()) == 6
    assert float(shares.sum()) == pytest.approx(1)
    assert int(scorer(0, queries, SPEC.head_dim**-0.5).argmax()) != 6


def test_scores_are_near_the_attention_itself() -> None:
    chunks = [keys(seed) for seed in range(6, 10)]
    for chunk in chunks:
        for layer in chunk:
            layer += torch.randn(layer.shape[0], 4, 1, layer.shape[2]).expand(-1, -1, 64, -1).flatten(1, 2)
    queries = torch.randn(4, 20, SPEC.head_dim, generator=torch.Generator().manual_seed(10))
    scorer = SummaryScorer([ChunkSummary.make(chunk, SHAPE) for chunk in chunks], 64, SHAPE)
    expected = attention_shares(queries, torch.cat([chunk[0] for chunk in chunks], 1), 0.25, 64)
    torch.testing.assert_close(scorer(0, queries, 0.25), expected, atol=0.02, rtol=0.2)


def test_every_query_head_counts_with_its_own_kv_head() -> None:
    """Four query heads, two KV heads: the first two heads ask for frame 0, the others for frame 1."""
    wanted = torch.eye(SPEC.head_dim)[:2] * 50
    stored = torch.zeros(2, 128, SPEC.head_dim)
    stored[0, :64] = stored[1, 64:] = 1
    queries = wanted[[0, 0, 1, 1]][:, None]
    torch.testing.assert_close(attention_shares(queries, stored, 1.0, 64), torch.tensor([0.5, 0.5]))
    stored[1] = stored[0]
    torch.testing.assert_close(attention_shares(queries, stored, 1.0, 64), torch.tensor([1.0, 0.0]))
