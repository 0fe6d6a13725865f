"""Which keys tokens see that are not neighbours, against attention written out."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore_client.reuse.blend.attention import CausalBlocks

KV_HEADS, HEADS, HEAD_DIM = 2, 4, 8
SCALE = 0.3


def written_out(
    positions: torch.Tensor, window: int | None, hidden: torch.Tensor, *tensors: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What is attended to, and the weights, in double precision, one query after the other."""
    queries, keys, values = (tensor.double() for tensor in tensors)
    weights = torch.zeros(HEADS, len(positions), keys.shape[1], dtype=torch.float64)
    for index, position in enumerate(positions.tolist()):
        first = 0 if window is None else max(0, position - window + 1)
        seen = [key for key in range(first, position + 1) if not hidden[key]]
        for head in range(HEADS):
            of_head = keys[head // (HEADS // KV_HEADS), seen]
            weights[head, index, seen] = (SCALE * of_head @ queries[head, index]).softmax(-1)
    return weights @ values.repeat_interleave(HEADS // KV_HEADS, 0), weights


@st.composite
def scenes(draw: st.DrawFn) -> tuple[int, list[int], int | None, list[int]]:
    total = draw(st.sampled_from([1, 2, 5, 40, 300]))
    count = draw(st.integers(1, min(total, 140)))
    chance = draw(st.randoms(use_true_random=False))
    positions = sorted(chance.sample(range(total), count))
    hidden = [key for key in range(total) if key not in positions and chance.random() < 0.2]
    return total, positions, draw(st.sampled_from([None, 1, 2, 7, 64, 299, 300, 1000])), hidden


@settings(max_examples=40, deadline=None)
@given(scenes())
def test_every_token_sees_what_is_not_behind_it(scene: tuple[int, list[int], int | None, list[int]]) -> None:
    total, at, window, unseen = scene
    positions, hidden = torch.tensor(at), torch.zeros(total, dtype=torch.bool)
    hidden[unseen] = True
    generator = torch.Generator().manual_seed(total)
    queries = torch.randn(HEADS, len(at), HEAD_DIM, generator=generator)
    keys, values = (torch.randn(KV_HEADS, total, HEAD_DIM, generator=generator) for _ in range(2))
    expected, weights = written_out(positions, window, hidden, queries, keys, values)
    blocks = CausalBlocks(positions, torch.float32, window=window, hidden=hidden)
    torch.testing.assert_close(blocks.attend(queries, keys, values, SCALE), expected.float())
    if not unseen:
        blocks = CausalBlocks(positions, torch.float32, window=window)
        torch.testing.assert_close(blocks.attend(queries, keys, values, SCALE), expected.float())
    if len(at) <= 128:
        seen = blocks.weights(queries, keys, SCALE)
        assert seen.dtype == torch.float32
        torch.testing.assert_close(seen, weights.float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_and_no_more(dtype: torch.dtype) -> None:
    positions, hidden = torch.arange(0, 500, 3), torch.zeros(500, dtype=torch.bool)
    hidden[1::30] = True
    queries = torch.randn(HEADS, len(positions), HEAD_DIM).to(dtype)
    keys, values = (torch.randn(KV_HEADS, 500, HEAD_DIM).to(dtype) for _ in range(2))
    blocks = CausalBlocks(positions, dtype, window=70, hidden=hidden)
    got = blocks.attend(queries, keys, values, SCALE)
    assert got.dtype == dtype
    expected, _ = written_out(positions, 70, hidden, queries, keys, values)
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=4 * torch.finfo(dtype).eps)


def test_a_triangle_counted_from_the_end_would_be_wrong() -> None:
    """Two tokens of ten: counted from the end the first sees nine keys, by its position two."""
    positions = torch.tensor([1, 4])
    queries, keys = torch.ones(HEADS, 2, HEAD_DIM), torch.ones(KV_HEADS, 10, HEAD_DIM)
    values = torch.arange(10.0)[None, :, None].expand(KV_HEADS, -1, HEAD_DIM).contiguous()
    got = CausalBlocks(positions, torch.float32).attend(queries, keys, values, 1 / math.sqrt(HEAD_DIM))
    torch.testing.assert_close(got[:, 0], torch.full((HEADS, HEAD_DIM), 0.5))
    torch.testing.assert_close(got[:, 1], torch.full((HEADS, HEAD_DIM), 2.0))
