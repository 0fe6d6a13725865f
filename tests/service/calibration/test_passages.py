import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvstore_codec.errors import CalibrationError
from kvstore_service.calibration import Plan, plan_passages


def numbered(*lengths: int) -> list[torch.Tensor]:
    """Texts whose token ids all differ."""
    return list(torch.arange(sum(lengths)).split(list(lengths)))


def ids_of(plan: Plan) -> tuple[list[int], list[int]]:
    fitted, held_out = (
        [int(i) for p in passages for i in (*p.context, *p.continuation)]
        for passages in (plan.fitted, plan.held_out)
    )
    return fitted, held_out


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=8), st.integers(1, 5000), st.integers(64, 4096))
def test_nothing_is_both_learnt_from_and_measured_on(lengths: list[int], tokens: int, longest: int) -> None:
    try:
        plan = plan_passages(numbered(*lengths), tokens, longest)
    except CalibrationError:
        assert sum(lengths) < 6 * 64
        return
    fitted, held_out = ids_of(plan)
    assert fitted
    assert held_out
    assert not set(fitted) & set(held_out)
    for passage in (*plan.fitted, *plan.held_out):
        assert len(passage.context) + len(passage.continuation) <= longest
        assert len(passage.continuation) > 0
    assert sum(len(passage.context) for passage in plan.fitted[:-1]) < tokens


def test_long_texts_give_whole_passages_in_turn() -> None:
    first, second = 10 * 2432, 7 * 2432
    plan = plan_passages(numbered(first, second), 3 * 2048, 8192)
    starts = [int(passage.context[0]) for passage in plan.fitted]
    assert starts == [0, first, 2432]
    assert [len(passage.context) for passage in plan.fitted] == [2048] * 3
    assert [int(p.context[0]) for p in plan.held_out] == [8 * 2432, first + 6 * 2432, 9 * 2432]


def test_short_texts_are_joined_and_passages_shrink() -> None:
    plan = plan_passages(numbered(*[50] * 20), 10**6, 8192)
    assert [len(passage.context) + len(passage.continuation) for passage in plan.held_out] == [166]
    assert len(plan.fitted) == 5


def test_too_little_text_is_refused() -> None:
    with pytest.raises(CalibrationError, match="383 tokens"):
        plan_passages(numbered(383), 1000, 8192)
