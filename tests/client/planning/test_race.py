"""When an engine that waits for a fetch had better compute."""

import pytest

from kvstore_client.planning import PrefillCost, Race
from tests.clock import Clock

CHUNK_TOKENS = 256
CHUNKS = 8
PREFILL = PrefillCost(0.0, 1e-3, 0.0)
END = CHUNKS * CHUNK_TOKENS + 100
"""Computing the whole prompt takes 2.148 s, a chunk .256 s."""


@pytest.fixture
def clock() -> Clock:
    return Clock(100.0)


@pytest.fixture
def race(clock: Clock) -> Race:
    return Race([index * CHUNK_TOKENS for index in range(CHUNKS + 1)], END, PREFILL, clock=clock)


def waits(seconds: float | None, chunks: int, endpoint: str = "a") -> list[tuple[str, float | None]]:
    return [(endpoint, seconds)] * chunks


def lost_after_s(race: Race, clock: Clock, chunk_s: float, arrives_s: float) -> float | None:
    """When the race is lost, for a link that is believed to bring a chunk in `chunk_s`, and does so in `arrives_s`."""
    begun_s = clock.now_s
    while (passed_s := clock.now_s - begun_s) < 100:
        delivered = min(int(passed_s / arrives_s), CHUNKS)
        if delivered == CHUNKS:
            return None
        if race.is_lost(delivered, waits(chunk_s, CHUNKS - delivered)):
            return passed_s
        clock.now_s += 0.05
    return None


@pytest.mark.parametrize("chunk_s", [0.1, 0.2])
def test_a_fetch_that_is_faster_than_computing_is_waited_for(
    race: Race, clock: Clock, chunk_s: float
) -> None:
    assert lost_after_s(race, clock, chunk_s, chunk_s) is None


def test_a_link_that_is_known_to_be_too_slow_is_left_at_once(race: Race, clock: Clock) -> None:
    after_s = lost_after_s(race, clock, 0.5, 0.5)
    assert after_s is not None
    assert after_s < 0.2


def test_a_link_that_is_believed_to_be_fast_and_brings_nothing_costs_a_tenth(
    race: Race, clock: Clock
) -> None:
    after_s = lost_after_s(race, clock, 0.01, 1e9)
    assert after_s == pytest.approx(0.1 * 2.148 + 0.05, abs=0.06)


@pytest.mark.parametrize("arrives_s", [0.26, 0.3, 0.5, 1.0])
def test_whatever_is_believed_the_request_is_hardly_late(race: Race, clock: Clock, arrives_s: float) -> None:
    begun_s = clock.now_s
    after_s = lost_after_s(race, clock, 0.01, arrives_s)
    if after_s is None:
        ended_s = CHUNKS * arrives_s + PREFILL.seconds(0, 100)
    else:
        kept = int(after_s / arrives_s) * CHUNK_TOKENS
        ended_s = clock.now_s - begun_s + PREFILL.seconds(kept, END - kept)
    assert ended_s <= 1.1 * 2.148 + 0.05 + 0.06


def test_the_last_chunks_are_waited_for_although_the_first_ones_were_slow(race: Race, clock: Clock) -> None:
    clock.now_s += 1.5
    assert not race.is_lost(6, waits(0.1, 2))


def test_a_pause_of_the_link_is_not_the_end(race: Race, clock: Clock) -> None:
    for seconds in (0.1, 0.5, 0.1, 0.5, 0.1):
        assert not race.is_lost(2, waits(seconds, 6))
        clock.now_s += 0.04


def test_an_unknown_link_is_only_late(race: Race, clock: Clock) -> None:
    clock.now_s += 0.2
    assert not race.is_lost(0, waits(None, 8))
    clock.now_s += 0.2
    assert race.is_lost(0, waits(None, 8))


def test_two_links_bring_their_chunks_together(clock: Clock) -> None:
    for endpoints, lost in (("a", True), ("ab", False)):
        race = Race([index * CHUNK_TOKENS for index in range(CHUNKS + 1)], END, PREFILL, clock=clock)
        coming = [(endpoints[index % len(endpoints)], 0.35) for index in range(CHUNKS)]
        race.is_lost(0, coming)
        clock.now_s += 0.11
        assert race.is_lost(0, coming) is lost


def test_the_time_before_the_fetch_counts(clock: Clock) -> None:
    begun_s = clock.now_s
    clock.now_s += 0.3
    race = Race([0, CHUNK_TOKENS], CHUNK_TOKENS + 10, PREFILL, begun_s, clock)
    assert race.is_lost(0, waits(0.01, 1))
