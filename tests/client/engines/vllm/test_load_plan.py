"""How much of a prompt is loaded, by what the engine and its worker have shown."""

import time

import numpy as np
import pytest

from kvstore_client.engines.vllm.load_plan import LoadPlanner, PlannedLoad
from kvstore_client.engines.vllm.worker_news import Learned
from kvstore_client.planning import CodecCost, PrefillCost
from kvstore_client.planning.leading import Offer
from kvstore_codec.identity import CHUNK_TOKENS
from kvstore_codec.model_spec import KVDtype, ModelSpec
from tests.clock import Clock

SPEC = ModelSpec("model", bytes(32), 30, 3, 64, KVDtype.BFLOAT16, None)
PREFILL = PrefillCost(0.02, 1e-3, 1e-7)
CHUNK_BYTES = 3e6
CODECS = {"exact-zstd": CodecCost(50e-6, 5e-6), "medium-klt-pco": CodecCost(80e-6, 5e-6)}


@pytest.fixture
def clock() -> Clock:
    return Clock(0.0)


@pytest.fixture
def planner(clock: Clock) -> LoadPlanner:
    return LoadPlanner(SPEC, 1, clock)


def offer(chunks: int, *, medium: bool = False) -> Offer:
    names = ("exact-zstd", "medium-klt-pco") if medium else ("exact-zstd",)
    sizes = np.tile([CHUNK_BYTES, CHUNK_BYTES / 20][: len(names)], (chunks, 1))
    bounds = np.arange(chunks + 1) * CHUNK_TOKENS
    return Offer(bounds, names, sizes, ("a",), np.zeros(chunks, np.intp))


def learned(bandwidth_bps: float) -> Learned:
    return Learned({"a": (bandwidth_bps / 8, 0.002)}, CODECS)


def planned(
    planner: LoadPlanner, offered: Offer, first: int = 0, end: int | None = None, busy_s: float = 0.0
) -> PlannedLoad | None:
    end = len(offered.links) * CHUNK_TOKENS if end is None else end
    return planner.plan(offered, first, end, end + 50, PREFILL, busy_s)


def test_all_is_loaded_where_nothing_is_known(planner: LoadPlanner) -> None:
    load = planner.plan(offer(8), 0, 8 * CHUNK_TOKENS, 8 * CHUNK_TOKENS + 50, None, 0.0)
    assert load is not None
    assert load.end_token == 8 * CHUNK_TOKENS


@pytest.mark.parametrize(("bandwidth_bps", "chunks"), [(1e9, 8), (300e6, 8), (50e6, 0), (10e6, 0)])
def test_the_link_decides(planner: LoadPlanner, bandwidth_bps: float, chunks: int) -> None:
    planner.learn(learned(bandwidth_bps))
    load = planned(planner, offer(8))
    assert (0 if load is None else load.end_token) == chunks * CHUNK_TOKENS


def test_a_small_encoding_makes_a_slow_link_worth_it(planner: LoadPlanner) -> None:
    planner.learn(learned(20e6))
    assert planned(planner, offer(8)) is None
    load = planned(planner, offer(8, medium=True))
    assert load is not None
    assert load.end_token == 8 * CHUNK_TOKENS
    assert sum(load.sizes_bytes.values()) == pytest.approx(8 * CHUNK_BYTES / 20)


def test_what_the_engine_has_is_not_loaded_and_the_end_is_kept(planner: LoadPlanner) -> None:
    planner.learn(learned(1e9))
    load = planned(planner, offer(8), first=640, end=1152)
    assert load is not None
    assert load.end_token == 1152
    assert load.sizes_bytes == {"a": 3 * CHUNK_BYTES}, "chunks 2, 3 and 4"


def test_loads_in_flight_take_their_share_and_give_it_back(planner: LoadPlanner, clock: Clock) -> None:
    planner.learn(learned(150e6))
    alone = planned(planner, offer(8))
    assert alone is not None
    for name in "abc":
        planner.begun(name, alone)
    assert planned(planner, offer(8)) is None
    clock.now_s += alone.fetch_s
    nearly = planned(planner, offer(8))
    assert nearly is not None
    assert nearly.fetch_s > 1.2 * alone.fetch_s
    for name in "abc":
        planner.ended(name, complete=False)
    assert planned(planner, offer(8)) == alone


def test_an_engine_that_is_busy_can_wait(planner: LoadPlanner) -> None:
    planner.learn(learned(50e6))
    assert planned(planner, offer(8)) is None
    assert planned(planner, offer(8), busy_s=10.0) is not None


def test_what_loads_take_longer_than_fetches_is_expected(planner: LoadPlanner, clock: Clock) -> None:
    """Short prompts are computed where beginning a load takes long."""
    planner.learn(learned(1e9))
    for _ in range(3):
        load = planned(planner, offer(1))
        assert load is not None
        planner.begun("one", load)
        clock.now_s += load.fetch_s + 0.02
        planner.ended("one", complete=True)
    assert planned(planner, offer(1)) is not None
    for _ in range(8):
        planner.begun("one", load)
        clock.now_s += load.fetch_s + 0.3
        planner.ended("one", complete=True)
    assert planned(planner, offer(1)) is None
    assert planned(planner, offer(8)) is not None


def test_a_delay_that_keeps_everything_from_being_loaded_is_forgotten(
    planner: LoadPlanner, clock: Clock
) -> None:
    """As after a time in which the engine's steps were long."""
    planner.learn(learned(1e9))
    load = planned(planner, offer(8))
    assert load is not None
    for _ in range(8):
        planner.begun("one", load)
        clock.now_s += load.fetch_s + 10.0
        planner.ended("one", complete=True)
    assert planned(planner, offer(8)) is None
    clock.now_s += 200.0
    assert planned(planner, offer(8)) is not None


def test_slow_decoding_that_keeps_everything_from_being_loaded_is_forgotten(
    planner: LoadPlanner, clock: Clock
) -> None:
    """As after a time in which others used the processor. The first load shows how fast decoding is now."""
    planner.learn(Learned({"a": (1e9, 0.002)}, {"exact-zstd": CodecCost(4e-3, 0.0)}))
    assert planned(planner, offer(8)) is None
    clock.now_s += 200.0
    load = planned(planner, offer(8))
    assert load is not None
    planner.begun("one", load)
    assert planned(planner, offer(8)) is None


def test_a_slow_link_is_not_forgotten_with_the_decoding(planner: LoadPlanner, clock: Clock) -> None:
    planner.learn(learned(20e6))
    assert planned(planner, offer(8)) is None
    clock.now_s += 2000.0
    assert planned(planner, offer(8)) is None


def test_one_slow_load_is_an_accident(planner: LoadPlanner, clock: Clock) -> None:
    planner.learn(learned(1e9))
    load = planned(planner, offer(8))
    assert load is not None
    for seconds in (0.0, 30.0):
        planner.begun("one", load)
        clock.now_s += load.fetch_s + seconds
        planner.ended("one", complete=True)
    assert planned(planner, offer(8)) == load


def test_a_node_that_has_sent_nothing_is_taken_for_the_slowest(planner: LoadPlanner) -> None:
    planner.learn(Learned({"b": (1e6, 0.0), "c": (1e9, 0.0)}, CODECS))
    assert planned(planner, offer(8)) is None


def test_a_thousand_chunks_take_a_few_milliseconds(planner: LoadPlanner) -> None:
    planner.learn(learned(100e6))
    long = offer(1000, medium=True)
    planned(planner, long)
    begun_s = time.perf_counter()
    assert planned(planner, long) is not None
    print(f"1000 chunks planned in {1e3 * (time.perf_counter() - begun_s):.1f} ms")
