"""vLLM itself: one engine stores, another one reuses, whatever happens to the store meanwhile."""

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from kvstore_client.client import connect
from kvstore_client.engines.vllm.naming import served_spec
from tests.vllm.engine_process import digests
from tests.vllm.processes import EngineProcess, StoreProcess, free_port, prompt

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800)]


def saved_model(folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "head_dim": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 8192}
    config = LlamaConfig(
        vocab_size=512, bos_token_id=1, eos_token_id=None, pad_token_id=None, **sizes, **heads
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@dataclass
class Setup:
    """Two engines of one model and their store."""

    folder: Path
    model: Path
    port: int
    store: StoreProcess
    first: EngineProcess
    second: EngineProcess

    def stored(self, chunks: int) -> None:
        """Wait until the store has that many chunks."""
        until(lambda: self.store.stats()["chunks"] >= chunks)

    def restart_store(self) -> None:
        """An empty store, whose nodes listen on other ports."""
        self.store = StoreProcess(self.folder, self.port)


def until(condition: Callable[[], bool], limit_s: float = 120) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def started(folder: Path, model: Path, port: int) -> EngineProcess:
    connector = {"address": f"127.0.0.1:{port}", "cache_dir": str(folder / "cache"), "stall_timeout_s": 5}
    return EngineProcess(folder, model=str(model), connector=connector)


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setup]:
    folder, port = tmp_path_factory.mktemp("vllm"), free_port()
    model = saved_model(folder / "model", seed=0)
    store = StoreProcess(folder, port)
    engines = [started(folder / name, model, port) for name in ("first", "second")]
    made = Setup(folder, model, port, store, *engines)
    yield made
    for process in (*engines, made.store):
        process.close()


def loaded(answer: dict[str, Any]) -> int:
    (cached,) = answer["cached"]
    return int(cached)


def test_a_second_engine_reuses_what_the_first_one_stored(setup: Setup, tmp_path: Path) -> None:
    """The same tokens as with the engine's own prefix cache, and the very bytes that were saved."""
    tokens = prompt(1300, seed=1)
    cold = setup.first.generate(tokens)
    assert loaded(cold) == 0
    setup.stored(5)
    own = setup.first.generate(tokens)
    hit = setup.second.generate(tokens)
    assert (loaded(own), loaded(hit)) == (1280, 1280)
    assert hit["tokens"] == own["tokens"] == cold["tokens"]

    config = AutoConfig.from_pretrained(setup.model)
    named = SimpleNamespace(model=str(setup.model), revision=None, hf_config=config, dtype=torch.float32)
    spec = served_spec(named, tmp_path)
    with connect(setup.store.started["address"], cache_dir=tmp_path) as client:
        match = client.match(spec, client.chunk_ids(spec, tokens))
        assert match.tokens == 1280
        buffers = client.buffers.acquire(spec, match.tokens)
        assert client.fetch(match, buffers, None).wait().complete
    saved = digests(buffers.keys, buffers.values)
    for engine in (setup.first, setup.second):
        assert set(saved) <= set(engine.ask(do="blocks")["digests"])


def test_what_the_engine_has_itself_is_not_loaded_over(setup: Setup) -> None:
    """The second engine has computed the beginning of the prompt, which other requests may be reading."""
    tokens = prompt(1300, seed=2)
    setup.second.generate(tokens[:400])
    chunks = setup.store.stats()["chunks"]
    cold = setup.first.generate(tokens)
    setup.stored(chunks + 4)
    hit = setup.second.generate(tokens)
    assert loaded(hit) == 1280
    assert hit["tokens"] == cold["tokens"]


def test_salts_never_meet(setup: Setup) -> None:
    tokens = prompt(600, seed=3)
    chunks = setup.store.stats()["chunks"]
    setup.first.generate(tokens, salts=["a"])
    setup.stored(chunks + 2)
    assert loaded(setup.second.generate(tokens, salts=["b"])) == 0
    assert loaded(setup.second.generate(tokens)) == 0
    assert loaded(setup.second.generate(tokens, salts=["a"])) == 512


def test_another_model_finds_nothing(setup: Setup, tmp_path: Path) -> None:
    tokens = prompt(600, seed=4)
    chunks = setup.store.stats()["chunks"]
    setup.first.generate(tokens)
    setup.stored(chunks + 2)
    other = started(tmp_path, saved_model(tmp_path / "other", seed=1), setup.port)
    assert loaded(other.generate(tokens)) == 0
    other.close()


def test_requests_aborted_while_they_wait_leave_nothing(setup: Setup) -> None:
    tokens = prompt(2000, seed=5)
    chunks = setup.store.stats()["chunks"]
    setup.first.generate(tokens)
    setup.stored(chunks + 7)
    for after_s in (0, 0.001, 0.01, 0.02, 0.05):
        assert not setup.second.ask(do="abort", prompt=tokens, after_s=after_s)["unfinished"]
    setup.second.generate(prompt(300, seed=6))
    until(lambda: setup.store.stats()["leases"] == 0)
    assert loaded_after_forgetting(setup.second, tokens) == 1792


def test_many_requests_leave_no_lease_thread_or_descriptor(setup: Setup) -> None:
    def round_of(seed: int) -> None:
        shared = prompt(512, seed=seed)
        prompts = [shared + prompt(200, seed=seed + number) for number in range(50)]
        cold = setup.first.generate(*prompts, max_tokens=2)
        hit = setup.second.generate(*prompts, max_tokens=2)
        assert hit["tokens"] == cold["tokens"]

    round_of(100)
    before = setup.second.ask(do="resources")
    for seed in (1000, 2000, 3000):
        round_of(seed)
    until(lambda: setup.store.stats()["leases"] == 0)
    # Threads of a fetch end just after it; pools keep the few that they have.
    until(lambda: setup.second.ask(do="resources")["threads"] <= before["threads"] + 8)
    assert setup.second.ask(do="resources")["descriptors"] <= before["descriptors"] + 8


def test_a_store_killed_at_any_time_costs_no_answer_and_is_found_again(setup: Setup) -> None:
    tokens = prompt(3000, seed=7)
    cold = setup.first.generate(tokens)
    until(lambda: loaded_after_forgetting(setup.second, tokens) == 2816)
    for delay_s in (0.0, 0.005, 0.02, 0.05):
        setup.second.ask(do="forget")
        killer = threading.Timer(delay_s, setup.store.kill)
        killer.start()
        assert setup.second.generate(tokens)["tokens"] == cold["tokens"]
        killer.join()
        setup.second.ask(do="forget")
        assert setup.second.generate(tokens)["tokens"] == cold["tokens"], "the store is away"
        setup.restart_store()
        setup.first.ask(do="forget")
        again = prompt(3000, seed=int(1000 * delay_s) + 8)
        until(lambda: stores(setup, again))  # noqa: B023
        tokens, cold = again, setup.first.generate(again)
        until(lambda: loaded_after_forgetting(setup.second, tokens) == 2816)  # noqa: B023


def loaded_after_forgetting(engine: EngineProcess, tokens: list[int]) -> int:
    engine.ask(do="forget")
    return loaded(engine.generate(tokens))


def stores(setup: Setup, tokens: list[int]) -> bool:
    """Whether the first engine has found the store again and stores."""
    setup.first.ask(do="forget")
    setup.first.generate(tokens)
    return bool(setup.store.stats()["chunks"])
