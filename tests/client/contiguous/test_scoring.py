"""Scores of frames: from key summaries, and from the keys themselves."""

import pytest
import torch

from kvstore_client.contiguous.prefix_keys import PrefixKeys
from kvstore_client.contiguous.scoring import FrameScores, SummaryScorer, scores_of
from kvstore_client.contiguous.summaries import ChunkSummary
from tests.client.chunks import SPEC
from tests.client.contiguous.test_summaries import SCORED, SHAPE, keys


def test_keys_of_zero_can_be_summarised() -> None:
    summary = ChunkSummary.make([torch.zeros(SPEC.kv_heads, 256, SPEC.head_dim)] * SCORED, SHAPE)
    scorer = SummaryScorer(PrefixKeys([summary], SHAPE), 64)
    scores = scorer(3, torch.randn(4, 3, SPEC.head_dim), 0.25)
    torch.testing.assert_close(scores.attention, torch.full((4,), 0.25))


def test_the_attended_frame_scores_highest() -> None:
    asked = torch.randn(SPEC.head_dim, generator=torch.Generator().manual_seed(3))
    chunks = [keys(4), keys(5)]
    chunks[1][1][:, 128:192] += 0.5 * asked  # frame 6 of the second scored layer
    scorer = SummaryScorer(PrefixKeys([ChunkSummary.make(chunk, SHAPE) for chunk in chunks], SHAPE), 64)
    queries = asked.expand(4, 3, -1)
    scores = scorer(3, queries, SPEC.head_dim**-0.5)
    for found in (scores.attention, scores.rank):
        assert found.shape == (8,)
        assert int(found.argmax()) == 6
    assert float(scores.attention.sum()) == pytest.approx(1)
    assert int(scorer(2, queries, SPEC.head_dim**-0.5).attention.argmax()) != 6


def test_scores_are_near_those_of_the_keys() -> None:
    chunks = [keys(seed) for seed in range(6, 10)]
    for chunk in chunks:
        for layer in chunk:
            layer += torch.randn(layer.shape[0], 4, 1, layer.shape[2]).expand(-1, -1, 64, -1).flatten(1, 2)
    queries = torch.randn(4, 20, SPEC.head_dim, generator=torch.Generator().manual_seed(10))
    scorer = SummaryScorer(PrefixKeys([ChunkSummary.make(chunk, SHAPE) for chunk in chunks], SHAPE), 64)
    expected = scores(queries, torch.cat([chunk[0] for chunk in chunks], 1), 0.25, 64)
    found = scorer(2, queries, 0.25)
    torch.testing.assert_close(found.attention, expected.attention, atol=0.03, rtol=0.2)
    torch.testing.assert_close(found.rank, expected.rank, atol=0.1, rtol=0.4)


def test_a_single_key_is_found_among_others_of_its_unit() -> None:
    """A mean would hide it."""
    chunk = keys(11)
    asked = torch.randn(SPEC.head_dim, generator=torch.Generator().manual_seed(12))
    chunk[2][:, 100] = 2 * asked
    scorer = SummaryScorer(PrefixKeys([ChunkSummary.make(chunk, SHAPE)], SHAPE), 16)
    scores = scorer(4, asked.expand(4, 1, -1), 1.0)
    assert int(scores.rank.argmax()) == 100 // 16


def test_every_query_head_counts_with_its_own_kv_head() -> None:
    """Four query heads, two KV heads: the first two heads ask for frame 0, the others for frame 1."""
    stored = [torch.zeros(2, 256, SPEC.head_dim) for _ in range(SCORED)]
    stored[0][0, :64], stored[0][1, 64:128] = 1, 1
    scorer = SummaryScorer(PrefixKeys([ChunkSummary.make(stored, SHAPE)], SHAPE), 64)
    queries = torch.ones(4, 1, SPEC.head_dim) * 50
    found = scorer(2, queries, 1.0).attention
    torch.testing.assert_close(found, torch.tensor([0.5, 0.5, 0, 0]))
    queries[2:] = 0
    found = scorer(2, queries, 1.0).attention
    torch.testing.assert_close(found, torch.tensor([0.625, 0.125, 0.125, 0.125]))


def test_one_token_that_needs_a_frame_is_heard() -> None:
    """Nineteen query tokens look at frame 0 and a little at frame 1; the last one looks at frame 2."""
    products = torch.zeros(1, 3, 20)
    products[0, 0, :19], products[0, 1, :19], products[0, 2, 19] = 5, 3, 8
    found = scores_of(products)
    assert found.attention.argsort(descending=True).tolist() == [0, 1, 2]
    assert found.rank.argsort(descending=True).tolist() == [2, 0, 1]


def scores(queries: torch.Tensor, stored: torch.Tensor, scale: float, frame_tokens: int) -> FrameScores:
    """What exact keys say, `[kv_heads, tokens, head_dim]`."""
    asked = queries.reshape(len(stored), -1, queries.shape[-1]) * scale
    return scores_of((stored @ asked.transpose(1, 2)).unflatten(1, (-1, frame_tokens)).amax(2))
