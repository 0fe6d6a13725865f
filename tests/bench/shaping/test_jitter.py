"""Patterns of bandwidth over time, and what is left of a link that one was played on."""

import itertools
import math
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore_bench.shaping.jitter import Schedule, parse_jitter, playing, read_trace
from kvstore_codec.errors import ConfigurationError


class NotedLink:
    """Says when it was told what."""

    def __init__(self) -> None:
        self.told: list[tuple[float, float]] = []
        self.changed = threading.Event()

    def set_bandwidth(self, bandwidth_bps: float) -> None:
        self.told.append((time.monotonic(), bandwidth_bps))
        self.changed.set()

    def wait_until_told(self, times: int) -> None:
        while len(self.told) < times:
            assert self.changed.wait(60)
            self.changed.clear()


def test_none_stays() -> None:
    schedule = parse_jitter("none").schedule(5e6)
    assert list(schedule.changes()) == [(0.0, 5e6)]
    assert schedule.bandwidth_bps(1e6) == 5e6


def test_a_step_goes_down_to_a_twentieth_and_back() -> None:
    schedule = parse_jitter("step").schedule(1e9)
    assert list(schedule.changes()) == [(0.0, 1e9), (0.1, 5e7), (1.1, 1e9)]


def test_a_step_of_its_own_numbers() -> None:
    pattern = parse_jitter("step:1gbit,40mbit,at=200ms,for=2s")
    assert pattern.full_bps == 1e9
    assert list(pattern.schedule(7.0).changes()) == [(0.0, 1e9), (0.2, 4e7), (2.2, 1e9)]


def test_a_saw_sinks_and_starts_over() -> None:
    schedule = parse_jitter("saw:10mbit,period=0.5s").schedule(1e8)
    first = list(itertools.takewhile(lambda change: change[0] < 0.5, schedule.changes()))
    rates = [bandwidth_bps for _, bandwidth_bps in first]
    assert rates == sorted(rates, reverse=True)
    assert (rates[0], rates[-1]) == pytest.approx((1e8, 1e7))
    assert schedule.bandwidth_bps(0.5) == 1e8
    assert parse_jitter("saw").schedule(1e8).bandwidths_bps[-1] == pytest.approx(1e7)


@pytest.mark.parametrize(
    "text",
    ["", "steps", "none:1mbit", "step:1gbit", "step:at=0s", "step:at=soon", "step:period=1s", "saw:1mbit,2mbit",
     "trace", "trace:"],
)  # fmt: skip
def test_what_is_no_jitter_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match="jitter"):
        parse_jitter(text)


def test_a_trace_is_repeated_and_knows_its_mean(tmp_path: Path) -> None:
    file = tmp_path / "trace.txt"
    file.write_text("# seconds bit/s\n10 1e6\n11 3e6  # better\n\n12 2e6\n")
    pattern = parse_jitter(f"trace:{file}")
    assert pattern.full_bps == pytest.approx(2e6)
    schedule = pattern.schedule(1.0)
    assert [change for change, _ in zip(schedule.changes(), range(4), strict=False)] == [
        (0.0, 1e6),
        (1.0, 3e6),
        (2.0, 2e6),
        (3.0, 1e6),
    ]


@pytest.mark.parametrize(
    "text", ["", "0 1e6", "0 1e6\n0 2e6", "0 1e6\n1 0", "0 1e6\n1 inf", "0\n1", "a b\nc d"]
)
def test_what_is_no_trace_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "trace.txt"
    file.write_text(text)
    with pytest.raises(ConfigurationError, match="is not a trace"):
        read_trace(file)
    with pytest.raises(ConfigurationError, match="cannot read"):
        read_trace(tmp_path / "none.txt")


@given(
    spans=st.lists(st.floats(0.01, 10), min_size=1, max_size=8),
    at_s=st.floats(0, 1000),
    repeats=st.booleans(),
)
def test_changes_and_bandwidth_agree(spans: list[float], at_s: float, repeats: bool) -> None:
    starts = [0.0, *itertools.accumulate(spans)][:-1]
    schedule = Schedule(
        tuple(starts), tuple(float(i + 1) for i in range(len(spans))), sum(spans) if repeats else math.inf
    )
    past = [bps for start, bps in itertools.takewhile(lambda change: change[0] <= at_s, schedule.changes())]
    near = any(
        abs(at_s - start) < 1e-6
        for start, _ in itertools.takewhile(lambda c: c[0] <= at_s + 1, schedule.changes())
    )
    if not near:  # where rounding decides, either is right
        assert schedule.bandwidth_bps(at_s) == past[-1]


def test_a_link_follows_and_is_given_back() -> None:
    link = NotedLink()
    began_s = time.monotonic()
    with playing(link, Schedule((0.0, 0.05, 0.1), (3.0, 2.0, 1.0))):
        link.wait_until_told(3)
    assert [bps for _, bps in link.told] == [3.0, 2.0, 1.0, 3.0]
    assert link.told[1][0] - began_s >= 0.05
    assert link.told[2][0] - began_s >= 0.1


def test_an_endless_pattern_ends_with_the_run() -> None:
    link = NotedLink()
    with playing(link, Schedule((0.0, 0.001), (2.0, 1.0), 0.002)):
        time.sleep(0.02)
    told = len(link.told)
    time.sleep(0.01)
    assert len(link.told) == told
    assert link.told[-1][1] == 2.0
    assert "link-jitter" not in [thread.name for thread in threading.enumerate()]


def test_a_link_that_cannot_be_changed_is_told() -> None:
    class Stuck(NotedLink):
        def set_bandwidth(self, bandwidth_bps: float) -> None:
            super().set_bandwidth(bandwidth_bps)
            if bandwidth_bps == 1.0:
                raise ConfigurationError("stuck")

    link = Stuck()
    with pytest.raises(ConfigurationError, match="stuck"), playing(link, Schedule((0.0, 0.001), (2.0, 1.0))):
        link.wait_until_told(2)
