"""An engine that computes other KV than its peers is found out by the canary's probe."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore_client.engines.vllm.probe import probe_prompt
from tests.vllm.kept_canaries import models
from tests.vllm.models import saved_model
from tests.vllm.processes import EngineProcess, StoreProcess, free_port, loaded, prompt, started_engine, until

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[StoreProcess]:
    process = StoreProcess(tmp_path, free_port())
    yield process
    process.close()


def compute_probe(engine: EngineProcess) -> None:
    engine.generate(probe_prompt(512), salts=["a salt that no other request has"], max_tokens=1)


def test_an_engine_with_a_hook_neither_reads_nor_stores(store: StoreProcess, tmp_path: Path) -> None:
    port = int(store.started["address"].rpartition(":")[2])
    model = saved_model(tmp_path / "model", seed=0)
    right, wrong = (started_engine(tmp_path / name, model, port) for name in ("right", "wrong"))
    compute_probe(right)
    until(lambda: len(models(store)) == 1)
    tokens = prompt(1300, seed=1)
    right.generate(tokens)
    until(lambda: store.stats()["chunks"] == 5)

    wrong.ask(do="steer")
    compute_probe(wrong)

    def refused() -> bool:
        wrong.generate(
            prompt(20, seed=2)
        )  # a comparison that could not be made is repeated with a later step
        return bool(models(store)[0].refusals)

    until(refused)
    assert loaded(wrong.generate(tokens)) == 0
    wrong.generate(prompt(600, seed=3))

    right.ask(do="forget")
    assert loaded(right.generate(tokens)) == 1280
    right.generate(prompt(300, seed=4))
    until(lambda: store.stats()["chunks"] == 6)
    assert store.stats()["chunks"] == 6, "the wrong engine has stored nothing"
    for engine in (right, wrong):
        engine.close()
