"""What a ratio buys, whatever the scores are."""

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore_client.recompute import FORCED_TOKENS, Probe, ReusedChunk, select
from kvstore_client.recompute.base import ShareOf
from kvstore_client.recompute.random import Random
from kvstore_codec.errors import ConfigurationError


class Given:
    """A selector of scores that are given."""

    name = "given"
    needs_kv = False

    def __init__(self, scores: list[float], *, per_chunk: bool) -> None:
        self.share_of: ShareOf = "chunk" if per_chunk else "prompt"
        self._scores = scores
        self.asked = 0

    def scores(self, chunks: Sequence[ReusedChunk], prompt_tokens: int, probe: Probe | None) -> torch.Tensor:
        self.asked += 1
        assert len(self._scores) == prompt_tokens
        return torch.tensor(self._scores)


@st.composite
def prompts(draw: st.DrawFn) -> tuple[list[ReusedChunk], list[float]]:
    chunks, position = [], 0
    for _ in range(draw(st.integers(0, 6))):
        position += draw(st.integers(0, 5))
        tokens = range(position, position + draw(st.integers(0, 40)))
        chunks.append(ReusedChunk(tokens, exact=draw(st.booleans()), begins_text=draw(st.booleans())))
        position = tokens.stop
    total = position + draw(st.integers(0, 5))
    score = st.floats(-5, 5, width=32) | st.sampled_from([0.0, 1.0])
    return chunks, draw(st.lists(score, min_size=total, max_size=total))


def forced_of(chunk: ReusedChunk) -> list[int]:
    needed = chunk.begins_text and chunk.tokens.start and not chunk.exact
    return list(chunk.tokens[:FORCED_TOKENS]) if needed else []


def best(scores: list[float], chunks: list[ReusedChunk], ratio: float) -> list[int]:
    """As the rule says it: forced tokens, then the best others as far as the budget goes."""
    forced = [position for chunk in chunks for position in forced_of(chunk)]
    others = [p for chunk in chunks for p in chunk.tokens if p not in forced]
    others.sort(key=lambda position: (-scores[position], position))
    budget = math.floor(ratio * sum(len(chunk.tokens) for chunk in chunks) + 1e-9)
    return forced + others[: max(budget - len(forced), 0)]


@settings(max_examples=300, deadline=None)
@given(prompts(), st.floats(0, 1) | st.sampled_from([0.0, 0.05, 0.15, 0.3, 1.0]), st.booleans())
def test_the_best_within_the_budget(
    prompt: tuple[list[ReusedChunk], list[float]], ratio: float, per_chunk: bool
) -> None:
    chunks, scores = prompt
    chosen = select(Given(scores, per_chunk=per_chunk), chunks, len(scores), ratio)
    assert chosen.dtype == torch.int64
    approximate = [chunk for chunk in chunks if not chunk.exact]
    groups = [[chunk] for chunk in approximate] if per_chunk else [approximate]
    if math.floor(ratio * sum(len(chunk.tokens) for chunk in approximate) + 1e-9) == 0:
        groups = [approximate]
    assert chosen.tolist() == sorted(position for group in groups for position in best(scores, group, ratio))


@settings(max_examples=100, deadline=None)
@given(prompts())
def test_all_of_it_is_every_approximate_token(prompt: tuple[list[ReusedChunk], list[float]]) -> None:
    chunks, scores = prompt
    selector = Given(scores, per_chunk=False)
    expected = [position for chunk in chunks if not chunk.exact for position in chunk.tokens]
    assert select(selector, chunks, len(scores), 1.0).tolist() == expected
    assert selector.asked == 0, "where there is nothing to choose nobody is asked"


def test_hundredths_are_whole() -> None:
    """.29 * 100 is 28.999999999999996."""
    chunk = ReusedChunk(range(100), exact=False)
    for hundredths in range(101):
        assert len(select(Random(), [chunk], 100, hundredths / 100)) == hundredths


def test_the_first_tokens_of_what_began_a_text() -> None:
    falling = [float(-position) for position in range(60)]
    rising = [float(position) for position in range(60)]
    chunks = [
        ReusedChunk(range(20), exact=False, begins_text=True),  # it still begins one
        ReusedChunk(range(20, 40), exact=False, begins_text=True),
        ReusedChunk(range(40, 60), exact=True, begins_text=True),
    ]
    forced = list(range(20, 20 + FORCED_TOKENS))
    for per_chunk in (False, True):
        assert select(Given(falling, per_chunk=per_chunk), chunks, 60, 0.0).tolist() == forced
    # floor(.3 * 40) = 12: 8 that are forced and the 4 best.
    assert select(Given(rising, per_chunk=False), chunks, 60, 0.3).tolist() == [*forced, 36, 37, 38, 39]
    # floor(.3 * 20) = 6 of each: 8 that are forced in the one, the best 6 of the other.
    assert select(Given(rising, per_chunk=True), chunks, 60, 0.3).tolist() == [*range(14, 20), *forced]


def test_nothing_to_compute() -> None:
    exact = ReusedChunk(range(8), exact=True, begins_text=True)
    for chunks in ([], [exact], [ReusedChunk(range(0), exact=False)]):
        assert select(Random(), chunks, 8, 0.5).tolist() == []


@pytest.mark.parametrize("ratio", [-0.1, 1.1, math.nan, math.inf])
def test_a_ratio_is_a_share(ratio: float) -> None:
    with pytest.raises(ConfigurationError, match="between 0 and 1"):
        select(Random(), [ReusedChunk(range(8), exact=False)], 8, ratio)
