"""The planner for an engine that computes only when a fetch has ended, against trying every plan."""

import itertools
import time

import numpy as np
import pytest

from kvstore_client.planning import COMPUTE, ChunkWork, LeadingPlanner, PrefillCost, Work
from kvstore_client.planning.adaptive import WORTH_MIXING
from kvstore_client.planning.leading import TIE
from kvstore_client.planning.predict import predict
from tests.client.planning.works import CHUNK_TOKENS, chunk, options, work

ENCODINGS = ("exact-raw", "exact-zstd", "medium-klt-pco")
BANDWIDTHS_BPS = (0.1e6, 0.5e6, 1e6, 2e6, 5e6, 12.5e6, 50e6, 125e6, 1e9)
SLOW_DECODER = PrefillCost(fixed_s=0.0, per_token_s=0.1e-3, per_pair_s=0.0)


def chosen(made: Work) -> list[str | None]:
    """The encoding of each chunk in the plan, None for chunks that are computed."""
    plan = LeadingPlanner().plan(made)
    assert plan.order == "front"
    found: list[str | None] = []
    for one in made.chunks:
        choice = plan.choices[one.index]
        found.append(None if choice == COMPUTE else one.options[choice].encoding)
    return found


def leading(encodings: list[str | None]) -> int:
    """Number of chunks that are fetched, which must be the first ones."""
    number = sum(name is not None for name in encodings)
    assert None not in encodings[:number]
    return number


def best_s(made: Work) -> float:
    """Least predicted time of all leading runs in all encodings."""
    times = []
    for number in range(len(made.chunks) + 1):
        for some in itertools.product(*(range(len(one.options)) for one in made.chunks[:number])):
            choices = dict.fromkeys((one.index for one in made.chunks), COMPUTE)
            choices |= {one.index: choice for one, choice in zip(made.chunks, some, strict=False)}
            times.append(predict(made, choices, "front").predicted_s)
    return min(times)


@pytest.mark.parametrize("bandwidth_bps", BANDWIDTHS_BPS)
@pytest.mark.parametrize("prefill", [None, SLOW_DECODER, PrefillCost(0.01, 4e-3, 1e-6)])
@pytest.mark.parametrize("busy_s", [0.0, 0.3])
def test_no_other_plan_is_much_faster(
    bandwidth_bps: float, prefill: PrefillCost | None, busy_s: float
) -> None:
    more = {} if prefill is None else {"prefill": prefill}
    made = work([chunk(index, *ENCODINGS) for index in range(6)], bandwidth_bps, engine_busy_s=busy_s, **more)  # type: ignore[arg-type]
    plan = LeadingPlanner().plan(made)
    everything_s = predict(made, dict.fromkeys(range(6), COMPUTE), "front").predicted_s
    least_s = best_s(made)
    assert plan.predicted_s <= everything_s
    # What gains little, or nothing on a somewhat slower link, is not fetched.
    assert plan.predicted_s <= max(least_s * WORTH_MIXING, min(everything_s, least_s * TIE / 0.75))


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_one_encoding_is_planned_as_well_as_can_be(encoding: str) -> None:
    for bandwidth_bps in np.geomspace(1e5, 1e9, 60):
        made = work([chunk(index, encoding) for index in range(8)], float(bandwidth_bps))
        plan, least_s = LeadingPlanner().plan(made), best_s(made)
        everything_s = predict(made, dict.fromkeys(range(8), COMPUTE), "front").predicted_s
        assert plan.predicted_s <= TIE * least_s or plan.predicted_s == everything_s <= TIE * least_s / 0.75


def test_a_slow_link_brings_nothing_and_a_fast_one_everything() -> None:
    chunks = [chunk(index, "exact-zstd") for index in range(20)]
    assert leading(chosen(work(chunks, 1e6))) == 0
    assert leading(chosen(work(chunks, 1e9))) == 20


def test_attention_over_a_long_context_is_worth_less_waiting_at_its_beginning() -> None:
    """Computing a token costs more, the further back it is: the first chunks would be computed, but only leading ones
    can be fetched. So it is all or nothing where the sum pays."""
    prefill = PrefillCost(0.0, 0.1e-3, 1e-6)
    chunks = [chunk(index, "exact-raw") for index in range(40)]
    numbers = {leading(chosen(work(chunks, bps, prefill=prefill))) for bps in np.geomspace(1e6, 1e9, 40)}
    assert numbers == {0, 40}


def test_a_small_encoding_is_taken_where_the_link_is_slow_and_a_faithful_one_where_it_is_fast() -> None:
    chunks = [chunk(index, *ENCODINGS) for index in range(8)]
    assert set(chosen(work(chunks, 5e6))) == {"medium-klt-pco"}
    assert set(chosen(work(chunks, 1e9))) == {"exact-raw"}


def test_nothing_behind_a_chunk_that_cannot_be_fetched() -> None:
    chunks = [chunk(index, "exact-raw") for index in range(8)]
    chunks[3] = ChunkWork(3, 3 * CHUNK_TOKENS, CHUNK_TOKENS, "a", ())
    assert leading(chosen(work(chunks, 1e9))) == 3
    chunks[0] = ChunkWork(0, 0, CHUNK_TOKENS, "a", ())
    assert leading(chosen(work(chunks, 1e9))) == 0


def test_chunks_with_other_encodings_are_fetched_in_what_they_have() -> None:
    chunks = [chunk(0, "exact-raw"), chunk(1, "medium-klt-pco"), chunk(2, "exact-raw", "medium-klt-pco")]
    assert chosen(work(chunks, 1e9)) == ["exact-raw", "medium-klt-pco", "exact-raw"]


def test_links_of_several_nodes_bring_their_chunks_together() -> None:
    one = [chunk(index, "exact-zstd") for index in range(8)]
    two = [chunk(index, "exact-zstd", endpoint="ab"[index % 2]) for index in range(8)]
    bandwidth_bps = 60e6
    slow, fast = (LeadingPlanner().plan(work(chunks, bandwidth_bps)) for chunks in (one, two))
    assert fast.fetch_s < 0.7 * slow.fetch_s


def test_other_fetches_take_their_share_of_the_link() -> None:
    chunks = [chunk(index, "exact-zstd") for index in range(8)]
    alone = work(chunks, 80e6)
    size = sum(one.options[0].size_bytes for one in chunks)
    with_small = Work(**{**fields(alone), "others_bytes": {"a": [size / 4]}})
    with_large = Work(**{**fields(alone), "others_bytes": {"a": [8.0 * size, 8.0 * size]}})
    times = [
        predict(made, dict.fromkeys(range(8), 0), "front").fetch_s for made in (alone, with_small, with_large)
    ]
    assert times[1] == pytest.approx(times[0] * 1.25, rel=0.05)
    assert times[2] == pytest.approx(times[0] * 3, rel=0.05)
    assert leading(chosen(alone)) == 8
    assert leading(chosen(with_large)) == 0


def test_while_the_engine_works_for_others_waiting_costs_nothing() -> None:
    chunks = [chunk(index, "exact-zstd") for index in range(8)]
    assert leading(chosen(work(chunks, 6e6))) == 0
    assert leading(chosen(work(chunks, 6e6, engine_busy_s=10.0))) == 8


def test_an_unknown_link_is_tried() -> None:
    made = work([chunk(index, "exact-zstd") for index in range(8)], {})
    assert leading(chosen(made)) == 8


def test_an_empty_match_is_computed() -> None:
    assert LeadingPlanner().plan(work([], 1e6)).predicted_s == pytest.approx(0.05, rel=0.5)


def test_a_thousand_chunks_are_planned_in_little_time() -> None:
    shared = options(*ENCODINGS)
    chunks = [ChunkWork(index, index * CHUNK_TOKENS, CHUNK_TOKENS, "a", shared) for index in range(1000)]
    made = work(chunks, 12.5e6)
    begin_s = time.perf_counter()
    assert leading(chosen(made)) == 1000
    print(f"1000 chunks planned in {1e3 * (time.perf_counter() - begin_s):.1f} ms")


def fields(made: Work) -> dict[str, object]:
    return {name: getattr(made, name) for name in made.__dataclass_fields__}
