"""The ratio follows the link, smoothly and within bounds."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore_client.planning import Links
from kvstore_client.recompute.controller import MOST_STEP, RatioOnline
from kvstore_client.recompute.tuning import LEAST_RATIO, balance
from kvstore_codec.errors import ConfigurationError

TOKEN_BYTES = 46_080.0
speeds = st.floats(1e5, 1e11)
compute = st.floats(1e-6, 1e-2)
limits = st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted)


@settings(deadline=None)
@given(limits, st.floats(0, 1), st.lists(st.tuples(speeds, st.integers(0, 5000), compute), max_size=40))
def test_stays_within_its_bounds_and_moves_in_steps(
    bounds: list[float], start: float, requests: list[tuple[float, int, float]]
) -> None:
    least, most = bounds
    online = RatioOnline(start, least=least, most=most)
    before = online.ratio(TOKEN_BYTES, None)
    assert least <= before <= most
    for bandwidth_Bps, tokens, token_s in requests:  # noqa: N806
        online.computed(tokens, tokens * token_s)
        now = online.ratio(TOKEN_BYTES, bandwidth_Bps)
        assert least - 1e-12 <= now <= most + 1e-12
        assert abs(now - before) <= MOST_STEP + 1e-12
        before = now


@settings(deadline=None)
@given(speeds, compute, st.floats(0.15, 1), st.floats(0.15, 1))
def test_settles_where_no_other_ratio_is_faster(
    bandwidth_Bps: float,  # noqa: N803
    token_s: float,
    start: float,
    other: float,
) -> None:
    online = RatioOnline(start)
    for _ in range(100):
        online.computed(1000, 1000 * token_s)
        ratio = online.ratio(TOKEN_BYTES, bandwidth_Bps)
    transfer_s = TOKEN_BYTES / bandwidth_Bps
    waits = [max(r * token_s, (1 - r) * transfer_s) for r in (ratio, other)]
    assert waits[0] <= waits[1] * (1 + 1e-6) + 1e-9 * (token_s + transfer_s)
    assert ratio == pytest.approx(min(max(balance(token_s, transfer_s), LEAST_RATIO), 1.0), abs=1e-6)


@settings(deadline=None)
@given(speeds, speeds, compute, st.floats(0.15, 1))
def test_a_slower_link_never_means_a_smaller_ratio(
    one_Bps: float,  # noqa: N803
    other_Bps: float,  # noqa: N803
    token_s: float,
    start: float,
) -> None:
    slow, fast = (
        RatioOnline(start, compute_s=token_s).ratio(TOKEN_BYTES, speed)
        for speed in sorted((one_Bps, other_Bps))
    )
    assert slow >= fast


def test_a_step_of_the_link_is_followed_without_overshooting() -> None:
    online = RatioOnline(compute_s=4e-4)
    ratios = [online.ratio(TOKEN_BYTES, 1e9) for _ in range(50)]
    assert ratios[-1] == LEAST_RATIO
    slower = [online.ratio(TOKEN_BYTES, 1e8) for _ in range(50)]  # 461 us to fetch, 400 us to compute
    assert slower == sorted(slower)
    assert slower[-1] == pytest.approx(461 / 861, abs=1e-3)
    again = [online.ratio(TOKEN_BYTES, 1e9) for _ in range(50)]
    assert again == sorted(again, reverse=True)
    assert again[-1] == pytest.approx(LEAST_RATIO, abs=1e-3)


def test_what_is_not_known_moves_nothing() -> None:
    online = RatioOnline(0.4)
    assert online.ratio(TOKEN_BYTES, 1e5) == 0.4  # how long computing takes is not known
    online.computed(0, 1.0)
    online.computed(100, 0.0)
    assert online.ratio(TOKEN_BYTES, 1e5) == 0.4
    online.computed(100, 0.04)
    for bandwidth_Bps in (None, 0.0):  # noqa: N806
        assert online.ratio(TOKEN_BYTES, bandwidth_Bps) == 0.4
    assert online.ratio(TOKEN_BYTES, 1e5) > 0.4


def test_one_slow_pass_does_not_decide() -> None:
    steady, disturbed = (RatioOnline(0.5, compute_s=4e-4) for _ in range(2))
    disturbed.computed(1000, 1000 * 8e-4)
    ratios = [online.ratio(TOKEN_BYTES, 1e8) for online in (steady, disturbed)]
    assert ratios[0] > ratios[1] > ratios[0] - 0.02


def test_with_the_link_as_it_is_measured() -> None:
    now_s = 0.0
    links = Links(clock=lambda: now_s)
    online = RatioOnline(compute_s=4e-4)
    assert online.ratio(TOKEN_BYTES, links.bandwidth_Bps("node:1")) == LEAST_RATIO
    for _ in range(40):
        now_s += 0.05
        links.observe("node:1", 5_000_000, 0.05)  # 100 MB/s
        ratio = online.ratio(TOKEN_BYTES, links.bandwidth_Bps("node:1"))
    assert ratio == pytest.approx(461 / 861, abs=1e-3)


def test_bounds_that_are_none() -> None:
    with pytest.raises(ConfigurationError):
        RatioOnline(0.5, least=0.6, most=0.4)
