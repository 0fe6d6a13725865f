"""What benchmarks/vllm_kl.py measures, with a small model in float32."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from kvstore_bench.vllm.divergence import Questions, ask_cold, ask_own_cache, ask_store, divergence_row
from kvstore_bench.vllm.engine import Engine, EngineOptions
from kvstore_bench.vllm.policies import kvstore_connector
from kvstore_bench.vllm.prompts import Prompt
from kvstore_bench.vllm.stores import Store
from tests.vllm.calibrated import calibration_of, publish, saved_sharp_model
from tests.vllm.processes import StoreProcess, prompt
from tests.vllm.server_process import save_tokenizer

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

TOKENS = 600
MOST_KL = 0.06
"""Nats per token. `medium` is calibrated for .02."""
ROUNDING_KL = 1e-6


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> EngineOptions:
    model = saved_sharp_model(tmp_path_factory.mktemp("model"))
    save_tokenizer(model, 512)
    # A share, because two engines are in memory at a time.
    extra = ("--enforce-eager", "--gpu-memory-utilization", "0.1", "--max-logprobs=-1")
    return EngineOptions(model, TOKENS + 100, dtype="float32", extra=extra)


def test_lossy_kv_changes_what_vllm_expects_a_little(
    options: EngineOptions, store: StoreProcess, tmp_path: Path
) -> None:
    address = store.started["address"]
    publish(address, tmp_path, calibration_of(options.model))
    settings = {"encoding": "medium-klt-pco", "floor": "medium", "fetch_policy": "fixed"}
    stored = cast("Store", SimpleNamespace(stored=lambda: store.stats()["chunks"]))
    questions = Questions([Prompt(seed, tuple(prompt(TOKENS, seed=seed))) for seed in range(2)], positions=3)
    with (
        Engine("cold", Path(sys.executable), options, tmp_path, None) as without,
        Engine(
            "medium",
            Path(sys.executable),
            options,
            tmp_path,
            kvstore_connector(address, tmp_path / "cache", settings),
        ) as with_store,
    ):
        without.wait()
        cold = ask_cold(without.completions, questions)
        own = divergence_row(cold, ask_own_cache(without.completions, questions))
        with_store.wait()
        medium = divergence_row(cold, ask_store(with_store.completions, questions, stored))
    assert [len(found.log_probabilities) for found in cold] == [512] * 6
    assert (own["positions"], own["reused_tokens"], own["same_likeliest"]) == (6, 512, 1.0)
    assert abs(own["kl"]) < ROUNDING_KL
    assert (medium["positions"], medium["reused_tokens"]) == (6, 512)
    assert ROUNDING_KL < medium["kl"] < MOST_KL
