"""The cost of forward passes from timed ones."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore_client.planning import PrefillCost
from kvstore_client.planning.prefill_fit import TimedPass, fit

TERM_ERROR = 0.05**2


def timed(cost: PrefillCost, first: int, tokens: int, factor: float = 1.0) -> TimedPass:
    return TimedPass(tokens, tokens * (first + tokens / 2), cost.seconds(first, tokens) * factor)


@pytest.mark.parametrize(
    "cost", [PrefillCost(0.01, 4e-4, 3e-8), PrefillCost(0.0, 1e-3, 0.0), PrefillCost(0.03, 1e-5, 1e-9)]
)
def test_passes_of_many_kinds_tell_all_terms(cost: PrefillCost) -> None:
    noise = random.Random(0)
    places = [(0, 16), (0, 64), (0, 300), (0, 2048), (2048, 2048), (4096, 2048), (2000, 64), (9000, 512)] * 4
    found = fit(
        [timed(cost, *place, factor=noise.uniform(0.95, 1.05)) for place in places], term_error=TERM_ERROR
    )
    for place in ((0, 1000), (3000, 1000), (1000, 100)):
        assert found.seconds(*place) == pytest.approx(cost.seconds(*place), rel=0.15)


def test_equal_passes_tell_a_cost_for_each_token() -> None:
    """And not one for each pass, which would make the rest of a prompt as expensive as all of it."""
    found = fit([timed(PrefillCost(0.01, 4e-4, 3e-8), 0, 2048)] * 5, term_error=TERM_ERROR)
    assert found.seconds(0, 64) < 0.1 * found.seconds(0, 2048)
    assert found.fixed_s == 0


@given(st.lists(st.floats(0.25, 0.4), min_size=1, max_size=64))
def test_times_of_one_kind_of_pass_are_those_of_its_tokens(seconds: list[float]) -> None:
    """The rest of a prompt after a load, again and again: any term alone would fit these times."""
    passes = [TimedPass(208, 208 * 1896, one) for one in seconds]
    found = fit(passes, [0.5 ** (age / 16) for age in range(len(passes))], TERM_ERROR)
    assert (found.fixed_s, found.per_pair_s) == (0, 0)
    assert 0.25 * (1 - 1e-9) <= found.seconds(0, 208) <= 0.4 * (1 + 1e-9)


def test_one_pass_is_enough() -> None:
    found = fit([TimedPass(1000, 500_000, 2.0)], term_error=TERM_ERROR)
    assert found.seconds(0, 500) == pytest.approx(1.0)


def test_later_passes_may_count_more() -> None:
    slow, fast = PrefillCost(0.0, 4e-3, 0.0), PrefillCost(0.0, 1e-3, 0.0)
    passes = [timed(slow, 0, 500)] * 8 + [timed(fast, 0, 500)] * 8
    found = fit(passes, [0.5 ** (15 - index) for index in range(16)], TERM_ERROR)
    assert found.seconds(0, 500) == pytest.approx(0.5, rel=0.1)


def test_no_cost_is_negative() -> None:
    found = fit([TimedPass(100, 5_000, 1.0), TimedPass(200, 20_000, 1.1), TimedPass(400, 80_000, 0.9)])
    assert min(found.fixed_s, found.per_token_s, found.per_pair_s) >= 0
