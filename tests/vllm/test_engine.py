"""vLLM itself: one engine stores, another one reuses, whatever happens to the store meanwhile."""

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from kvstore_bench.vllm.worker_extension import digests
from kvstore_client.client import connect
from tests.vllm.engine_process import BLOCK_TOKENS
from tests.vllm.models import HIDDEN_SIZE, saved_model, spec_of
from tests.vllm.processes import (
    EngineProcess,
    StoreProcess,
    free_port,
    loaded,
    loaded_after_forgetting,
    prompt,
    started_engine,
    until,
)

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800)]

REQUESTS_IN_5_S = 20
"""One each quarter of a second."""


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


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setup]:
    folder, port = tmp_path_factory.mktemp("vllm"), free_port()
    model = saved_model(folder / "model", seed=0)
    store = StoreProcess(folder, port)
    engines = [
        started_engine(folder / name, model, port, enable_prompt_embeds=True) for name in ("first", "second")
    ]
    made = Setup(folder, model, port, store, *engines)
    yield made
    for process in (*engines, made.store):
        process.close()


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

    spec = spec_of(setup.model, tmp_path)
    with connect(setup.store.started["address"], cache_dir=tmp_path) as client:
        match = client.match(spec, client.chunk_ids(spec, tokens))
        assert match.tokens == 1280
        buffers = client.buffers.acquire(spec, match.tokens)
        assert client.fetch(match, buffers, None).wait().complete
    saved = digests(buffers.keys, buffers.values, BLOCK_TOKENS)
    for engine in (setup.first, setup.second):
        assert set(saved) <= set(engine.ask(do="blocks")["digests"])


def test_what_the_engine_has_itself_is_not_loaded_over(setup: Setup) -> None:
    """The second engine has computed the beginning of the prompt, which other requests may be reading."""
    tokens = prompt(1300, seed=2)
    chunks = setup.store.stats()["chunks"]
    setup.second.generate(tokens[:400])
    setup.stored(chunks + 1)
    cold = setup.first.generate(tokens)
    setup.stored(chunks + 5)
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
    setup.stored(chunks + 6)


def test_prompts_given_as_embeddings_never_meet(setup: Setup) -> None:
    """vLLM gives all of them the same tokens, and tells them apart by a hash, as it does with images."""
    one, other = (
        np.random.default_rng(seed).standard_normal((600, HIDDEN_SIZE), np.float32) for seed in (0, 1)
    )
    chunks = setup.store.stats()["chunks"]
    cold = setup.first.generate(one)
    setup.stored(chunks + 2)
    assert loaded(setup.second.generate(other)) == 0
    assert loaded(setup.second.generate([0] * 600)) == 0
    hit = setup.second.generate(one)
    assert loaded(hit) == 512
    assert hit["tokens"] == cold["tokens"]
    setup.stored(chunks + 6)


def test_a_prompt_whose_tokens_are_scored_is_computed_whole(setup: Setup) -> None:
    """Every token has its score, and the request ends, although most of its KV is stored."""
    tokens = prompt(600, seed=17)
    cold = setup.first.generate(tokens, scores=True)
    until(lambda: loaded_after_forgetting(setup.second, tokens) == 512)
    scored = setup.second.generate(tokens, scores=True)
    assert loaded(scored) == 0
    assert len(scored["scores"][0]) == 599
    assert scored == cold


def test_another_model_finds_nothing_and_reuses_its_own_kv_in_bfloat16(setup: Setup, tmp_path: Path) -> None:
    """In bfloat16 a hit gives the tokens of the engine's own prefix cache; a cold run may give others."""
    tokens = prompt(1300, seed=4)
    chunks = setup.store.stats()["chunks"]
    setup.first.generate(tokens)
    setup.stored(chunks + 5)
    other = started_engine(tmp_path, saved_model(tmp_path / "other", seed=1), setup.port, dtype="bfloat16")
    assert loaded(other.generate(tokens)) == 0
    setup.stored(chunks + 10)
    own = other.generate(tokens, max_tokens=24)
    other.ask(do="forget")
    hit = other.generate(tokens, max_tokens=24)
    assert (loaded(own), loaded(hit)) == (1280, 1280)
    assert hit["tokens"] == own["tokens"]
    assert setup.store.stats()["chunks"] == chunks + 10
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


def test_fifty_requests_at_a_time_get_the_tokens_of_a_cold_run(setup: Setup) -> None:
    shared = prompt(512, seed=100)
    prompts = [shared + prompt(200, seed=100 + number) for number in range(50)]
    chunks = setup.store.stats()["chunks"]
    cold = setup.first.generate(*prompts, max_tokens=2)
    setup.stored(chunks + 2)
    hit = setup.second.generate(*prompts, max_tokens=2)
    assert hit["tokens"] == cold["tokens"]


def test_a_thousand_requests_leave_no_lease_block_thread_or_descriptor(setup: Setup) -> None:
    prefixes = [prompt(256, seed=200 + number) for number in range(20)]
    chunks = setup.store.stats()["chunks"]
    setup.first.generate(*([*prefix, 2] for prefix in prefixes), max_tokens=1)
    setup.stored(chunks + len(prefixes))

    def round_of(prefix: list[int]) -> None:
        prompts = [prefix + prompt(20, seed=number) for number in range(50)]
        answer = setup.second.generate(*prompts, max_tokens=1)
        assert answer["cached"].count(256) >= 4

    round_of(prefixes[0])
    before = setup.second.ask(do="resources")
    for prefix in prefixes[1:]:
        round_of(prefix)
    until(lambda: setup.store.stats()["leases"] == 0)
    assert setup.second.ask(do="forget")["done"], "vLLM says no while a block is in use"
    # Threads of a fetch end just after it; pools keep the few that they have.
    until(lambda: setup.second.ask(do="resources")["threads"] <= before["threads"] + 8)
    assert setup.second.ask(do="resources")["descriptors"] <= before["descriptors"] + 8


def test_a_store_killed_at_any_time_costs_no_answer_and_is_found_again(
    setup: Setup, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before, during and after a load. The new store is empty, and its node listens on another port."""
    for number, delay_s in enumerate((0.0, 0.01, 0.04)):
        tokens = prompt(3000, seed=300 + number)
        cold = setup.first.generate(tokens)
        until(lambda: loaded_after_forgetting(setup.second, tokens) == 2816)  # noqa: B023
        setup.second.ask(do="forget")
        killer = threading.Timer(delay_s, setup.store.kill)
        killer.start()
        assert setup.second.generate(tokens)["tokens"] == cold["tokens"]
        killer.join()
        setup.second.ask(do="forget")
        assert setup.second.generate(tokens)["tokens"] == cold["tokens"], "the store is away"
        setup.restart_store()
        asked, took_s = asked_until_reuse(setup, seed=400 + 100 * number)
        with capsys.disabled():
            print(
                f"\nreuse is back {took_s:.1f} s after the store, with the {asked}th request of each engine"
            )
        assert asked <= REQUESTS_IN_5_S


def asked_until_reuse(setup: Setup, seed: int) -> tuple[int, float]:
    """How many prompts the first engine is asked, one each quarter of a second, until the second one reuses what it has
    stored of the last one, and how long that took."""
    assert setup.store.started
    begun_s = time.monotonic()
    for asked in range(1, 10 * REQUESTS_IN_5_S):
        tokens = prompt(300, seed=seed + asked)
        setup.first.generate(tokens, max_tokens=1)
        time.sleep(0.25)
        if loaded(setup.second.generate(tokens, max_tokens=1)):
            break
    return asked, time.monotonic() - begun_s
