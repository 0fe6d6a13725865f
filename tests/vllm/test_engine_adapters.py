"""vLLM itself with LoRA adapters: one engine stores, another one reuses, and adapters never meet."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import vllm

from tests.client.adapters import saved_adapter
from tests.vllm.models import saved_model
from tests.vllm.processes import EngineProcess, StoreProcess, free_port, prompt

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        vllm.__version__.startswith("0.30"), reason="it tells adapters apart by their names only"
    ),
]


@dataclass
class Setup:
    store: StoreProcess
    first: EngineProcess
    second: EngineProcess
    folder: Path

    def stored(self) -> int:
        """How many chunks the store has when it has all that the engines have computed."""
        for engine in (self.first, self.second):
            engine.ask(do="counts")
        chunks: int = self.store.stats()["chunks"]
        return chunks

    def adapter(self, name: str, number: int, seed: int, where: str) -> tuple[str, int, str]:
        """A request for an adapter that lies in a folder of its own."""
        return name, number, str(saved_adapter(self.folder / where, seed))


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setup]:
    folder, port = tmp_path_factory.mktemp("adapters"), free_port()
    model = saved_model(folder / "model", seed=0)
    store = StoreProcess(folder, port)
    # Long enough for a busy machine: a lookup that is late is a miss.
    connector = {"address": f"127.0.0.1:{port}", "lookup_timeout_s": 30}
    options: dict[str, Any] = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 8}
    engines = [
        EngineProcess(
            folder / name,
            model=str(model),
            connector=connector | {"cache_dir": str(folder / name / "cache")},
            **options,
        )
        for name in ("first", "second")
    ]
    yield Setup(store, *engines, folder)
    with ThreadPoolExecutor() as closing:
        list(closing.map(EngineProcess.close, engines))
    store.close()


def loaded(answer: dict[str, Any]) -> int:
    (cached,) = answer["cached"]
    return int(cached)


def test_each_adapter_finds_its_own_kv_and_no_other(setup: Setup) -> None:
    """The second engine calls the first one's adapter `a` otherwise, and another one `a`."""
    tokens = prompt(600, seed=1)
    chunks = setup.stored()
    own = setup.adapter("a", 1, seed=1, where="first/a")
    cold = setup.first.generate(tokens, adapter=own)
    assert setup.stored() == chunks + 2
    copy, same_name = (
        setup.adapter("copy", 1, seed=1, where="second/copy"),
        setup.adapter("a", 2, seed=2, where="second/a"),
    )
    for adapter in (copy, same_name):
        assert setup.second.ask(do="load_adapter", adapter=adapter)["done"]
    other = setup.second.generate(tokens, adapter=same_name)
    assert loaded(other) == 0
    plain = setup.second.generate(tokens)
    assert loaded(plain) == 0
    hit = setup.second.generate(tokens, adapter=copy)
    assert loaded(hit) == 512
    assert hit["tokens"] == cold["tokens"]
    assert len({tuple(answer["tokens"][0]) for answer in (cold, other, plain)}) == 3, (
        "they say different things"
    )
    assert setup.stored() == chunks + 6


def test_a_salt_is_kept_apart_with_an_adapter_as_without_one(setup: Setup) -> None:
    tokens, adapter = prompt(600, seed=2), setup.adapter("salted", 3, seed=3, where="salted")
    chunks = setup.stored()
    setup.first.generate(tokens, adapter=adapter, salts=["x"])
    assert setup.stored() == chunks + 2
    setup.second.ask(do="load_adapter", adapter=adapter)
    assert loaded(setup.second.generate(tokens, adapter=adapter, salts=["y"])) == 0
    assert loaded(setup.second.generate(tokens, salts=["x"])) == 0
    assert loaded(setup.second.generate(tokens, adapter=adapter, salts=["x"])) == 512


def test_an_adapter_that_was_replaced_in_place_is_neither_read_nor_stored(setup: Setup) -> None:
    tokens, adapter = prompt(600, seed=4), setup.adapter("policy", 4, seed=4, where="policy")
    chunks = setup.stored()
    first = setup.first.generate(tokens, adapter=adapter)
    assert setup.stored() == chunks + 2
    saved_adapter(Path(adapter[2]), 5)
    setup.first.ask(do="load_adapter", adapter=adapter, in_place=True)
    setup.first.ask(do="forget")
    second = setup.first.generate(tokens, adapter=adapter)
    assert loaded(second) == 0
    assert second["tokens"] != first["tokens"]
    counts = setup.first.ask(do="counts")
    assert counts["miss_adapter_changed"] == 1
    assert counts["miss_store_adapter_changed"] >= 1
    assert setup.stored() == chunks + 2
