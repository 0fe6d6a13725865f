"""The pair of budget and encoding that is quickest within a limit of loss."""

from dataclasses import replace

import pytest

from kvstore_client.contiguous.grid import FrameGrid
from kvstore_client.contiguous.quickest import Choice, QuickestChoice
from kvstore_client.match import Match, Variant
from kvstore_client.planning import CodecCost, Costs, Links, PrefillCost, Profile
from kvstore_client.planning.losses import PartLosses
from kvstore_codec.codec import encode_chunk
from kvstore_codec.encoding import Encoding
from tests.client.chunks import MEMBER, SPEC, random_kv, stored_chunks

CHUNKS = 8
EXACT, LOW = "exact-zstd", "low-zstd"
QUESTION = 30
LOSSES = PartLosses.of([(0.1, 0.2), (0.5, 0.04)])
ONE = {
    name: encode_chunk(
        *random_kv(0), spec=SPEC, chunk_id=stored_chunks(1)[0].chunk_id, encoding=Encoding.parse(name)
    )
    for name in (EXACT, LOW)
}


def match_of(*names: str) -> Match:
    """A prefix that is stored in these encodings."""
    return Match(
        tuple(
            replace(chunk, variants=tuple(Variant(ONE[name].header, ONE[name].parts[0]) for name in names))
            for chunk in stored_chunks(CHUNKS)
        )
    )


def chooser(bandwidth_Bps: float, *, low_decode_s: float = 1e-6) -> QuickestChoice:  # noqa: N803
    """Decoding and computing cost next to nothing, unless LOW is slow to decode."""
    costs = {EXACT: CodecCost(1e-6, 1e-7), LOW: CodecCost(low_decode_s, 1e-7)}
    links = Links()
    links.observe(MEMBER.endpoint, int(bandwidth_Bps), 1.0)
    return QuickestChoice(Costs(Profile(costs, PrefillCost(1e-4, 1e-2, 0.0), 0.0, 2)), links)


def choose(bandwidth_Bps: float, limit: float, *names: str, summary_bytes: int = 0, **costs: float) -> Choice:  # noqa: N803
    match = match_of(*names)
    quickest = chooser(bandwidth_Bps, **costs)
    return quickest.within(FrameGrid.each_of(match), match, QUESTION, LOSSES, limit, summary_bytes)


def encoding_of(grid: FrameGrid | None) -> str:
    assert grid is not None
    return grid.variants[0].header.encoding.name


def test_without_room_for_a_loss_the_whole_prefix_is_taken() -> None:
    choice = choose(1e6, 0.03, EXACT)
    assert (choice.grid, choice.loss) == (None, 0.0)


def test_on_a_slow_link_as_little_is_read_as_the_limit_allows() -> None:
    for limit, budget in ((0.05, 0.5), (0.2, 0.1)):
        choice = choose(1e6, limit, EXACT)
        assert encoding_of(choice.grid) == EXACT
        assert choice.budget == budget
        assert choice.loss <= limit


def test_losses_of_part_and_rate_add_up() -> None:
    assert encoding_of(choose(1e6, 0.1, EXACT, LOW).grid) == LOW
    assert choose(1e6, 0.1, EXACT, LOW).loss == pytest.approx(0.04 + 0.06)
    assert choose(1e6, 0.09, EXACT, LOW).loss <= 0.09


def test_the_whole_prefix_in_few_bits_beats_a_part_of_it_in_many() -> None:
    exact, low = (sum(len(part) for part in ONE[name].parts[1:]) for name in (EXACT, LOW))
    assert low < 0.5 * exact
    choice = choose(1e6, 0.06, EXACT, LOW)
    assert choice.grid is None
    assert choice.loss == 0.06


def test_few_bits_that_take_long_to_decode_are_left() -> None:
    choice = choose(1e6, 0.06, EXACT, LOW, low_decode_s=1.0)
    assert encoding_of(choice.grid) == EXACT


def test_of_ways_that_tie_the_one_that_loses_least_is_taken() -> None:
    choice = choose(1e12, 0.2, EXACT, LOW)
    assert (choice.grid, choice.loss) == (None, 0.0)


def test_summaries_that_must_be_read_first_count() -> None:
    assert choose(1e6, 0.05, EXACT).grid is not None
    assert choose(1e6, 0.05, EXACT, summary_bytes=10**8).grid is None


def test_a_given_budget_is_read_in_the_quickest_encoding_and_else_the_most_faithful() -> None:
    grids = FrameGrid.each_of(match_of(EXACT, LOW))
    assert encoding_of(chooser(1e6).of_share(grids, 0.1, QUESTION)) == LOW
    assert encoding_of(chooser(1e12).of_share(grids, 0.1, QUESTION)) == EXACT
