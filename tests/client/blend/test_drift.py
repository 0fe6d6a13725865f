"""What recomputed tokens show, and how the others follow."""

import math

import pytest
import torch

from kvstore_client.recompute import Drift, ReusedChunk
from tests.client.blend.reference import Prompt, prompt, sharp

pytestmark = pytest.mark.usefixtures("one_thread")

SHARE = 0.7


def middle(index: int) -> float:
    """Of the eight neighbours, counted from the chunk's first token, that move with it."""
    return index - index % 8 + 3.5


def exact(*tokens: int) -> ReusedChunk:
    return ReusedChunk(range(*tokens), exact=True)


def approximate(*tokens: int) -> ReusedChunk:
    return ReusedChunk(range(*tokens), exact=False)


def moved(
    chunks: list[ReusedChunk], selected: list[int], computed: list[int], shifts: torch.Tensor, total: int
) -> torch.Tensor:
    """By how much each position is moved, `[kv_heads, total, head_dim]`; `shifts` `[kv_heads, total, head_dim]` are
    new minus stored, of which only those at computed positions may be looked at."""
    drift = Drift(chunks, torch.tensor(selected), torch.tensor(computed), torch.float32)
    result = torch.zeros_like(shifts)
    if not drift.is_empty:
        of_pass = shifts[:, computed]  # as the pass has them
        spread = drift.spread(of_pass[:, drift.rows])
        assert torch.equal(of_pass[:, drift.rows], shifts[:, drift.seen])
        for cells, places, of in drift.places:
            result[:, places] += spread[:, cells].repeat_interleave(of, dim=1)
    result[:, selected] = 0  # they are put there, whatever was added
    return result


def test_a_shift_that_all_show_moves_all_by_seven_tenths() -> None:
    chunks = [exact(0, 20), approximate(20, 84), approximate(90, 154), approximate(160, 200)]
    shift = torch.randn(2, 1, 5)
    shifts = shift.expand(-1, 220, -1).clone()
    selected = [20, 33, 34, 83, 100, 101, 165]
    computed = sorted([*selected, 85, 86, *range(155, 160), *range(200, 220)])
    shifts[:, [i for i in range(220) if i not in selected]] = torch.nan
    shifts[:, [i for i in computed if i not in selected]] = 1e9  # new text shows nothing
    got = moved(chunks, selected, computed, shifts, 220)
    for chunk in chunks[1:3]:
        others = [position for position in chunk.tokens if position not in selected]
        torch.testing.assert_close(got[:, others], SHARE * shift.expand(-1, len(others), -1))
    # Exact chunks, one with a single selected token, and what belongs to no chunk stay.
    rest = [i for i in range(220) if not any(i in chunk.tokens for chunk in chunks[1:3])]
    assert not got[:, rest].any()


def test_neighbours_weigh_by_their_distance() -> None:
    selected, shifts = [10, 40], torch.zeros(1, 64, 1)
    shifts[0, 10], shifts[0, 40] = 3.0, -5.0
    got = moved([approximate(0, 64)], selected, selected, shifts, 64)
    for position in range(64):
        if position not in selected:
            near, far = (math.exp(-abs(middle(position) - at) / 16) + 0.02 for at in selected)
            expected = SHARE * (3 * near - 5 * far) / (near + far)
            assert got[0, position, 0].item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("selected", [[], [3], [3, 70], list(range(64)), [70, 71, 72]])
def test_too_few_or_all_of_a_chunk_move_nothing(selected: list[int]) -> None:
    chunks = [approximate(0, 64), exact(64, 128)]
    drift = Drift(chunks, torch.tensor(selected, dtype=torch.int64), torch.arange(128), torch.float32)
    assert drift.is_empty
    assert not moved(chunks, selected, list(range(128)), torch.ones(1, 128, 1), 128).any()


def drift_written_out(case: Prompt, selected: torch.Tensor) -> None:
    """Moves what is stored. Layer by layer: what a layer's recomputed tokens show moves the others before anybody
    attends to them, so what the next layer computes has to be asked for anew."""
    for layer in range(case.stored.keys.shape[0]):
        _, made, _ = case.expected(selected)
        for now, stored in (
            (made.keys[layer], case.stored.keys[layer]),
            (made.values[layer], case.stored.values[layer]),
        ):
            for chunk in case.chunks:
                inside = [p for p in selected.tolist() if p in chunk.tokens]
                if chunk.exact or len(inside) < 2:
                    continue
                shift = now[:, inside] - stored[:, inside]
                for position in set(chunk.tokens) - set(inside):
                    place = chunk.tokens.start + middle(position - chunk.tokens.start)
                    near = torch.tensor([math.exp(-abs(place - at) / 16) + 0.02 for at in inside])
                    stored[:, position] += SHARE * (shift * near[None, :, None]).sum(1) / near.sum()


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral-windows"])
def test_a_blend_with_drift_is_that_written_out(family: str) -> None:
    case = prompt(sharp(family))
    selected = case.approximate[torch.rand(192, generator=torch.Generator().manual_seed(5)) < 0.2]
    blend = case.blend()
    with torch.inference_mode():
        log_probabilities = blend._decoder.log_probabilities(
            blend.compute(selected, drift=True, question=True)
        )
    untouched, _, _ = case.expected(selected)
    drift_written_out(case, selected)
    expected, _, cache = case.expected(selected)
    torch.testing.assert_close(log_probabilities, expected[case.question :], rtol=1e-3, atol=1e-3)
    assert not torch.allclose(untouched[case.question :], expected[case.question :], rtol=1e-2, atol=1e-2)
    for layer, made in enumerate(cache.layers):
        torch.testing.assert_close(blend.kv.keys[layer], made.keys[0], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(blend.kv.values[layer], made.values[0], rtol=1e-3, atol=1e-3)


def test_drift_changes_nothing_where_all_is_exact_or_recomputed() -> None:
    case = prompt(sharp("llama"))
    same = prompt(case.model, all_exact=True)
    for of, selected in ((case, case.approximate), (same, torch.empty(0, dtype=torch.int64))):
        with torch.inference_mode():
            one, other = (of.blend().compute(selected, drift=drift, question=True) for drift in (True, False))
        assert torch.equal(one, other)
