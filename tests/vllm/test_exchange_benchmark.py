"""What benchmarks/gpu/vllm.py measures on a GPU, with servers on the CPU."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from kvstore_bench.vllm.engine import EngineOptions
from kvstore_bench.vllm.exchange import UNCOUNTED_PROMPTS, comparable_length, measure
from kvstore_bench.vllm.prompts import Prompt
from kvstore_bench.vllm.setups import setups
from tests.vllm.models import saved_model
from tests.vllm.processes import StoreProcess, prompt
from tests.vllm.server_process import save_tokenizer

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

TOKENS = comparable_length(1024)
BLOCK_TOKENS = 64


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> EngineOptions:
    model = saved_model(tmp_path_factory.mktemp("model"), seed=0)
    save_tokenizer(model, 512)
    # A share, because two engines are in memory at a time, as on a GPU.
    extra = ("--enforce-eager", "--gpu-memory-utilization", "0.1")
    return EngineOptions(
        model, TOKENS + 100, kv_cache_prompts=6, dtype="float32", block_tokens=BLOCK_TOKENS, extra=extra
    )


def test_a_second_server_holds_and_says_what_the_first_one_does(
    options: EngineOptions, store: StoreProcess, tmp_path: Path
) -> None:
    (setup,) = setups("exact", options.model, [None])
    asked = [Prompt(number, tuple(prompt(TOKENS, seed=number))) for number in range(UNCOUNTED_PROMPTS + 2)]
    stored = SimpleNamespace(stored=lambda: store.stats()["chunks"])
    result = measure(
        setup, Path(sys.executable), options, tmp_path, stored, store.started["address"], {TOKENS: asked}, 8
    )
    (row,) = result.rows
    assert row["same_bytes"]
    assert (row["prompts"], row["answers_compared"], row["answers_same_as_own_hit"]) == (2, 2, 2)
    assert (row["own_reused_tokens"], row["reused_tokens"]) == (1024, 1024)
    assert row["store_hit_ttft_s"] > 0
    assert result.memory is not None
    assert (result.memory["block_tokens"], result.memory["layers"]) == (BLOCK_TOKENS, 4)
    assert [(copy["direction"], copy["host_memory"]) for copy in result.copies] == [
        ("blocks to host", "pageable"),
        ("host to blocks", "pageable"),
    ]
    assert all(copy["identical"] for copy in result.copies)
