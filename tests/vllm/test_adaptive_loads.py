"""An engine behind a link loads what is sooner loaded, computes what is sooner computed, and answers alike."""

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvstore_bench.shaping import ShapedLink
from tests.vllm.processes import EngineProcess, StoreProcess, free_port, prompt

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800)]

TOKENS, LOADED = 2000, 1792
FAST_BPS, SLOW_BPS = 1e9, 2e6
"""The KV of 2,000 tokens has 16 MB. It takes .13 s, or 65 s."""


def slow_model(folder: Path) -> Path:
    """A model that takes long to compute, for the size of its KV."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 8, "head_dim": 64}
    heads = {"num_attention_heads": 12, "num_key_value_heads": 2, "max_position_embeddings": 8192}
    config = LlamaConfig(
        vocab_size=512, bos_token_id=1, eos_token_id=None, pad_token_id=None, **sizes, **heads
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@dataclass
class Setup:
    store: StoreProcess
    link: ShapedLink
    writer: EngineProcess
    reader: EngineProcess
    """Behind the link."""

    def stored(self, tokens: list[int]) -> dict[str, Any]:
        """Have the writer compute and store a prompt."""
        chunks = self.store.stats()["chunks"] + len(tokens) // 256
        cold = self.writer.generate(tokens)
        deadline_s = time.monotonic() + 120
        while self.store.stats()["chunks"] < chunks:
            assert time.monotonic() < deadline_s
            time.sleep(0.02)
        return cold

    def read(self, tokens: list[int]) -> dict[str, Any]:
        """Generate with an engine that has forgotten what it computed."""
        self.reader.ask(do="forget")
        return self.reader.generate(tokens)


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setup]:
    folder, port = tmp_path_factory.mktemp("adaptive"), free_port()
    model = slow_model(folder / "model")
    with ExitStack() as opened:
        store = StoreProcess(folder, port)
        opened.callback(store.close)
        link = opened.enter_context(ShapedLink(store.started["bulk"], bandwidth_bps=FAST_BPS))
        connector = {
            "address": f"127.0.0.1:{port}",
            "cache_dir": str(folder / "cache"),
            "stall_timeout_s": 60,
            "fetch_policy": "adaptive",
        }
        behind = connector | {"routes": f"{store.started['bulk']}={link.address}"}
        engines = [
            EngineProcess(folder / name, model=str(model), connector=settings)
            for name, settings in (("writer", connector), ("reader", behind))
        ]
        for engine in engines:
            opened.callback(engine.close)
        yield Setup(store, link, *engines)


def loaded(answer: dict[str, Any]) -> int:
    (cached,) = answer["cached"]
    return int(cached)


def test_a_fast_link_is_used(setup: Setup) -> None:
    tokens = prompt(TOKENS, seed=1)
    cold = setup.stored(tokens)
    setup.reader.generate(prompt(TOKENS, seed=2))  # it learns how fast it computes
    for _ in range(2):
        hit = setup.read(tokens)
        assert loaded(hit) == LOADED
        assert hit["tokens"] == cold["tokens"]


def test_a_link_that_is_cut_during_a_load_costs_little(setup: Setup) -> None:
    """The stall timeout is 60 s."""
    tokens = prompt(TOKENS, seed=3)
    cold = setup.stored(tokens)
    before = setup.link.from_target_bytes

    def cut() -> None:
        while setup.link.from_target_bytes < before + 1_000_000:
            time.sleep(0.001)
        setup.link.cut()

    cutting = threading.Thread(target=cut)
    cutting.start()
    began_s = time.monotonic()
    answer = setup.read(tokens)
    took_s = time.monotonic() - began_s
    cutting.join()
    setup.link.restore()
    assert answer["tokens"] == cold["tokens"]
    assert loaded(answer) < LOADED
    assert took_s < 50


def test_a_slow_link_is_not_used(setup: Setup) -> None:
    tokens = prompt(TOKENS, seed=4)
    cold = setup.stored(tokens)
    setup.link.set_bandwidth(SLOW_BPS)
    surprised = setup.read(tokens)
    assert loaded(surprised) < LOADED
    assert surprised["tokens"] == cold["tokens"]
    before = setup.link.from_target_bytes
    known = setup.read(tokens)
    assert loaded(known) == 0
    assert known["tokens"] == cold["tokens"]
    assert setup.link.from_target_bytes - before < 100_000
