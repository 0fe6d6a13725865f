"""A transformers worker and vLLM reuse each other's lossy KV."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from kvstore_client.client import connect
from kvstore_client.engines.transformers import CachedModel
from kvstore_client.engines.transformers.spec import spec_of
from kvstore_client.engines.vllm.probe import probe_prompt
from kvstore_codec.calibration import Calibration
from tests.vllm.calibrated import calibration_of, loaded_model, publish, saved_sharp_model
from tests.vllm.processes import (
    EngineProcess,
    StoreProcess,
    free_port,
    loaded,
    loaded_after_forgetting,
    prompt,
    until,
)

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

MEDIUM = "medium-klt-pco"
MOST_KL = 0.06
"""Nats per token. `medium` is calibrated for .02."""


@dataclass
class Setup:
    folder: Path
    store: StoreProcess
    saved: Path
    model: PreTrainedModel
    calibration: Calibration
    engine: EngineProcess

    @property
    def address(self) -> str:
        address: str = self.store.started["address"]
        return address

    def stored(self, chunks: int) -> None:
        until(lambda: self.store.stats()["chunks"] >= chunks)


def lossy_engine(folder: Path, model: Path, address: str) -> EngineProcess:
    connector = {
        "address": address,
        "cache_dir": str(folder / "cache"),
        "encoding": MEDIUM,
        "floor": "medium",
        "stall_timeout_s": 5,
    }
    return EngineProcess(folder, model=str(model), connector=connector)


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setup]:
    folder = tmp_path_factory.mktemp("exchange")
    store = StoreProcess(folder, free_port())
    saved = saved_sharp_model(folder / "model")
    calibration = calibration_of(saved)
    publish(store.started["address"], folder, calibration)
    engine = lossy_engine(folder / "engine", saved, store.started["address"])
    # Its canary is that of vLLM workers: transformers workers, which are compared later, have another.
    engine.generate(probe_prompt(512))
    engine.ask(do="counts")  # when it is stored
    yield Setup(folder, store, saved, loaded_model(saved), calibration, engine)
    engine.close()
    store.close()


@pytest.fixture
def transformers_worker(setup: Setup) -> Iterator[Callable[..., CachedModel]]:
    made: list[CachedModel] = []

    def make(**settings: Any) -> CachedModel:
        client = connect(setup.address, cache_dir=setup.folder, **{"encoding": MEDIUM, **settings})
        made.append(CachedModel(setup.model, client))
        client.prepare(made[-1].spec).result(60)
        return made[-1]

    yield make
    for worker in made:
        worker.close()
        worker.client.close()


def answer(worker: Any, tokens: list[int]) -> torch.Tensor:
    """Log-probabilities of the token behind the prompt, `[vocabulary]`."""
    options = {
        "max_new_tokens": 1,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    logits: torch.Tensor = worker.generate(torch.tensor([tokens]), **options).logits[0][0]
    return logits.log_softmax(-1)


def engine_kl(cold: dict[str, Any], hit: dict[str, Any]) -> float:
    """KL divergence of an answer's first token, over the tokens that are likely in both answers."""
    (exact,), (found,) = cold["logprobs"], hit["logprobs"]
    shared = exact.keys() & found.keys()
    return float(sum(math.exp(exact[token]) * (exact[token] - found[token]) for token in shared))


def test_vllm_reuses_what_a_transformers_worker_stored(
    setup: Setup, transformers_worker: Callable[..., CachedModel]
) -> None:
    tokens = prompt(1300, seed=1)
    worker = transformers_worker()
    cold_answer = answer(setup.model, tokens)
    answer(worker, tokens)
    worker.client.store.flush()
    hit = setup.engine.generate(tokens, logprobs=20)
    assert loaded(hit) == 1280
    (found,) = hit["logprobs"]
    kl = sum(
        math.exp(cold_answer[int(token)]) * float(cold_answer[int(token)] - other)
        for token, other in found.items()
    )
    assert abs(kl) < MOST_KL


def test_a_transformers_worker_reuses_what_vllm_stored(
    setup: Setup, transformers_worker: Callable[..., CachedModel]
) -> None:
    tokens, chunks = prompt(1300, seed=2), setup.store.stats()["chunks"]
    cold = setup.engine.generate(tokens, logprobs=20)
    assert loaded(cold) == 0
    setup.stored(chunks + 5)
    worker = transformers_worker()
    found, exact = answer(worker, tokens), answer(setup.model, tokens)
    assert worker.last_report.reused_tokens == 1280
    kl = float((exact.exp() * (exact - found)).sum())
    assert 0 < kl < MOST_KL
    setup.engine.ask(do="forget")
    own = setup.engine.generate(tokens, logprobs=20)
    assert loaded(own) == 1280
    assert abs(engine_kl(cold, own)) < MOST_KL


def test_vllm_reads_exact_chunks_of_transformers_and_stores_only_lossy_ones(
    setup: Setup, transformers_worker: Callable[..., CachedModel]
) -> None:
    tokens = prompt(1100, seed=3)
    worker = transformers_worker(encoding="exact-zstd")
    answer(worker, tokens[:700])
    worker.client.store.flush()
    chunks = setup.store.stats()["chunks"]
    hit = setup.engine.generate(tokens, logprobs=20)
    assert loaded(hit) == 512
    setup.stored(chunks + 2)
    setup.engine.ask(do="forget")
    again = setup.engine.generate(tokens, logprobs=20)
    assert loaded(again) == 1024
    assert abs(engine_kl(hit, again)) < MOST_KL
    match = worker.client.match(worker.spec, worker.client.chunk_ids(worker.spec, tokens))
    worker.client.release(match)
    assert len(match.chunks) == 2, "a worker that accepts exact chunks only finds none of vLLM's"


def test_another_model_and_another_calibration_are_misses(setup: Setup, tmp_path: Path) -> None:
    tokens, chunks = prompt(600, seed=4), setup.store.stats()["chunks"]
    setup.engine.generate(tokens)
    setup.stored(chunks + 2)
    saved = saved_sharp_model(tmp_path / "other", seed=1)
    other = lossy_engine(tmp_path, saved, setup.address)
    assert loaded(other.generate(tokens)) == 0
    assert other.ask(do="counts")["miss_store_no_calibration"] == 1
    digest = spec_of(loaded_model(saved)).digest
    publish(setup.address, tmp_path, setup.calibration, digest)
    assert loaded(other.generate(prompt(600, seed=5))) == 0
    assert other.ask(do="counts")["miss_store_no_calibration"] == 2
    assert setup.store.stats()["chunks"] == chunks + 2
    publish(setup.address, tmp_path, calibration_of(saved))
    later = prompt(600, seed=6)
    other.generate(later)
    setup.stored(chunks + 4)
    # The scheduler's half begins to load the calibration when it first meets a chunk that needs it.
    until(lambda: loaded_after_forgetting(other, later) == 512)
    other.close()
