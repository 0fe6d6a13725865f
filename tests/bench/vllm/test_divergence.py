"""How far apart distributions of the next token are, and where prompts are cut to ask for them."""

import math

import numpy as np
import pytest

from kvstore_bench.vllm.completions import NextToken
from kvstore_bench.vllm.divergence import Questions, divergence_row
from kvstore_bench.vllm.prompts import Prompt
from kvstore_codec.errors import ConfigurationError


def expected(*probabilities: float, reused: int = 256) -> NextToken:
    return NextToken(np.log(probabilities), reused)


def asked(tokens: int, positions: int) -> Questions:
    return Questions([Prompt(0, tuple(range(tokens)))], positions)


def test_divergence_is_that_of_the_cold_distribution_from_the_other_one() -> None:
    cold, other = expected(0.5, 0.25, 0.25, reused=0), expected(0.25, 0.5, 0.25)
    row = divergence_row([cold, cold], [cold, other])
    far = 0.5 * math.log(2) - 0.25 * math.log(2)
    assert row["kl"] == pytest.approx(far / 2)
    assert row["kl_max"] == pytest.approx(far)
    assert (row["positions"], row["same_likeliest"]) == (2, 0.5)


def test_prompts_are_asked_at_lengths_behind_what_is_reused() -> None:
    questions = asked(2000, 8)
    assert questions.reused_tokens == 1792
    assert [len(ids) for ids in questions.beginnings] == [2000 - 26 * place for place in range(8)]
    assert asked(2048, 1).reused_tokens == 1792


@pytest.mark.parametrize(("tokens", "positions"), [(256, 1), (260, 5)])
def test_prompts_with_too_little_to_reuse_or_behind_it_are_refused(tokens: int, positions: int) -> None:
    with pytest.raises(ConfigurationError, match="choose other"):
        asked(tokens, positions)
