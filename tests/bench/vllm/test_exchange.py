"""Pairs of engines: what is asked for, and what is said about their answers."""

from pathlib import Path

import pytest

from kvstore_bench.vllm.completions import Answer
from kvstore_bench.vllm.exchange import Exchanged, comparable_length, exchange_row
from kvstore_bench.vllm.setups import NAMES, setups
from kvstore_codec.errors import ConfigurationError

MODEL = Path("model")


def answer(ttft_s: float, reused: int, *tokens: int) -> Answer:
    return Answer(ttft_s, ttft_s + 1, tokens, reused)


def test_vllms_own_cache_and_the_store_can_reuse_the_same_tokens_of_a_prompt() -> None:
    for tokens in (1, 2000, 2048, 8000):
        length = comparable_length(tokens)
        whole_chunks = (length - 1) // 256 * 256
        for block_tokens in (16, 128):
            assert (length - 1) // block_tokens * block_tokens == whole_chunks > 0


def test_answers_that_reuse_other_numbers_of_tokens_are_not_compared() -> None:
    own = answer(0.1, 2048, 1, 2)
    found = [
        Exchanged(answer(1.0, 0, 1, 3), own, answer(0.2, 2048, 1, 2)),
        Exchanged(answer(1.2, 0, 1, 2), own, answer(0.4, 2048, 1, 3)),
        Exchanged(answer(1.4, 0, 1, 2), own, answer(1.3, 0, 1, 2)),
    ]
    row = exchange_row(found)
    assert (row["answers_compared"], row["answers_same_as_own_hit"]) == (2, 1)
    assert (row["cold_ttft_s"], row["own_hit_ttft_s"], row["store_hit_ttft_s"]) == (1.2, 0.1, 0.4)
    assert (row["own_reused_tokens"], row["reused_tokens"]) == (2048, 2048)


def test_an_engine_alone_loads_nothing() -> None:
    row = exchange_row([Exchanged(answer(1.0, 0, 1), answer(0.1, 2048, 1), None)])
    assert (row["store_hit_ttft_s"], row["reused_tokens"], row["answers_compared"]) == (None, None, 0)


def test_exact_kv_is_exchanged_in_every_layout() -> None:
    found = setups(",".join(NAMES), MODEL, ["NHD", "HND"])
    assert [setup.label for setup in found] == ["vllm", "exact-NHD", "exact-HND", "adaptive", "offloading"]
    made = [setup.connector("127.0.0.1:1", Path("cache")) for setup in found]
    environments = [one.environment for one in made if one is not None]
    chosen = [environment.get("VLLM_KV_CACHE_LAYOUT") for environment in environments]
    assert made[0] is None
    assert chosen == ["NHD", "HND", None, None]


def test_an_unknown_connector_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="no connector 'lmcache'"):
        setups("exact,lmcache", MODEL, [None])
