"""The baselines read what they say, and attend to what they read."""

import time
from pathlib import Path

import pytest
import torch

from kvstore_bench.reprefill.baselines import NAMES, Baselines
from kvstore_bench.reprefill.block_cache import BlockCache, Rank, frequency_times_share, lfu, lru
from kvstore_bench.reprefill.kv_file import KVFile, KVShape
from kvstore_bench.reprefill.layerwise import Layerwise
from kvstore_bench.reprefill.prefix_kv import PrefixKV
from kvstore_bench.reprefill.prompts import Prompts, Question
from kvstore_codec.errors import ConfigurationError
from tests.client.models import random_prompt, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS = 512
SHAPE = KVShape(layers=2, kv_heads=3, tokens=256, head_dim=8, dtype=torch.float32)


def random_kv() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    shape = (SHAPE.kv_heads, SHAPE.tokens, SHAPE.head_dim)
    keys, values = ([torch.randn(shape, generator=generator) for _ in range(2)] for _ in range(2))
    return keys, values


@pytest.mark.parametrize("chunk_tokens", [16, 64])
def test_a_file_returns_what_was_written(tmp_path: Path, chunk_tokens: int) -> None:
    keys, values = random_kv()
    file = KVFile(tmp_path / "kv", SHAPE, chunk_tokens, 2, None)
    file.write(keys, values)
    assert torch.equal(file.read_probes(1), keys[1][:2])
    for chunk, block in file.read_chunks(1, [0, 1, 3]).items():
        place = slice(chunk * chunk_tokens, (chunk + 1) * chunk_tokens)
        assert torch.equal(block, torch.cat((keys[1][2:, place], values[1][:, place])))
    assert file.bytes_read == file.probe_bytes + 3 * file.chunk_bytes
    assert file.read_chunks(0, []) == {}
    file.close()


def test_a_file_is_as_slow_as_its_disk(tmp_path: Path) -> None:
    keys, values = random_kv()
    file = KVFile(tmp_path / "kv", SHAPE, 64, 0, rate_Bps=1e6)
    file.write(keys, values)
    began_s = time.monotonic()
    file.read_chunks(0, [0, 1, 2, 3])
    assert time.monotonic() - began_s >= 4 * file.chunk_bytes / 1e6
    file.close()


def block() -> torch.Tensor:
    return torch.zeros(25)


@pytest.mark.parametrize(("rank", "kept"), [(lru, {1, 2}), (lfu, {0, 1}), (frequency_times_share, {1, 2})])
def test_caches_drop_by_rank(rank: Rank, kept: set[int]) -> None:
    """Uses: chunk 0 twice, with few important tokens, then 1 twice, then 2 once."""
    cache = BlockCache(200, rank)
    for chunk, share in ((0, 0.1), (0, 0.1), (1, 0.9), (1, 0.9), (2, 0.5)):
        cache.used((0, chunk), block(), share)
    assert {chunk for chunk in range(3) if cache.get((0, chunk)) is not None} == kept


@pytest.fixture(scope="module")
def prompts() -> Prompts:
    questions = tuple(Question("text", random_prompt(20, seed=seed)[0], 10) for seed in range(2, 5))
    return Prompts(random_prompt(TOKENS, seed=1)[0], questions)


@pytest.fixture(scope="module")
def kv(prompts: Prompts) -> PrefixKV:
    return PrefixKV(tiny_model(), prompts)


@pytest.fixture
def baselines(prompts: Prompts, kv: PrefixKV, tmp_path: Path) -> Baselines:
    return Baselines(tiny_model(), prompts, kv, tmp_path, probes=1)


def system(baselines: Baselines, name: str, budget: float, cache_bytes: float = 0) -> Layerwise:
    return baselines.make(name, budget, cache_bytes, None)


@pytest.mark.parametrize("name", NAMES)
def test_the_whole_budget_predicts_as_the_model(
    baselines: Baselines, prompts: Prompts, kv: PrefixKV, name: str
) -> None:
    made = system(baselines, name, 1.0)
    for question in prompts.questions:
        expected = kv.log_probabilities(question)
        torch.testing.assert_close(made.log_probabilities(question), expected, atol=1e-4, rtol=1e-4)
    made.close()


def test_impress_reads_the_probes_and_the_chunks_of_important_tokens(
    baselines: Baselines, prompts: Prompts
) -> None:
    made = system(baselines, "impress", 0.05)
    asked = made.ask(prompts.questions[0])
    layers = made.decoder.layers
    assert asked.bytes_needed == layers * int(0.05 * TOKENS) * made.file.shape.token_bytes
    assert asked.bytes_read == layers * (
        made.file.probe_bytes + asked.tokens_read / 64 * made.file.chunk_bytes
    )
    assert asked.reading_s == asked.waited_s > 0
    made.close()


def test_smaller_chunks_and_reordering_read_less(baselines: Baselines, prompts: Prompts) -> None:
    read = {}
    for name in ("impress", "impress-16", "impress-reordered"):
        made = system(baselines, name, 0.05)
        read[name] = sum(made.ask(question).tokens_read for question in prompts.questions)
        made.close()
    assert read["impress-16"] < read["impress"]
    assert read["impress-reordered"] < read["impress"]


@pytest.mark.parametrize("name", ["as_h2o_lru", "as_h2o_lfu"])
def test_attention_store_reads_everything_that_is_not_cached(
    baselines: Baselines, prompts: Prompts, name: str
) -> None:
    made = system(baselines, name, 0.05, cache_bytes=1e9)
    first, second = (made.ask(question) for question in prompts.questions[:2])
    assert first.tokens_read == TOKENS
    assert (second.tokens_read, second.cache_hit_rate) == (0, 1.0)
    made.close()


def test_an_unknown_baseline_is_refused(baselines: Baselines) -> None:
    with pytest.raises(ConfigurationError, match="impress-16"):
        system(baselines, "impress-32", 0.5)
