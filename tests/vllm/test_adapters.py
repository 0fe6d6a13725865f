"""The scheduler's half with requests that have LoRA adapters, and a real store."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import vllm
from vllm.config import LoRAConfig
from vllm.lora.request import LoRARequest
from vllm.v1.request import Request

from kvstore_client.client import KVStoreClient, connect
from kvstore_client.engines.adapter import read_adapter
from kvstore_client.engines.vllm import adapters
from kvstore_client.engines.vllm.metadata import SaveRequest
from kvstore_client.engines.vllm.scheduler import SchedulerHalf
from kvstore_client.new_chunk import NewChunk
from kvstore_codec.identity import CHUNK_TOKENS
from tests.client.adapters import saved_adapter
from tests.vllm.processes import StoreProcess, prompt, until
from tests.vllm.test_scheduler_half import BLOCK, SPEC, answer, continued, put, request, scheduled

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(
        vllm.__version__.startswith("0.30"), reason="it tells adapters apart by their names only"
    ),
]

BLOCKS = list(range(6))


@pytest.fixture
def client(store: StoreProcess, tmp_path: Path) -> Iterator[KVStoreClient]:
    with connect(store.started["address"], cache_dir=tmp_path / "cache") as connected:
        yield connected


@pytest.fixture
def half(client: KVStoreClient) -> Iterator[SchedulerHalf]:
    made = started(client)
    yield made
    made.close()


def started(client: KVStoreClient, **config: Any) -> SchedulerHalf:
    return SchedulerHalf(client, SPEC, BLOCK, lora_config=LoRAConfig(lora_dtype=torch.float32, **config))


def with_adapter(
    tokens: list[int], folder: Path | str, name: str = "request", *, called: str = "adapter", lora_id: int = 1
) -> Request:
    return request(tokens, name, lora_request=LoRARequest(called, lora_id, str(folder)))


def saved(half: SchedulerHalf, asked: Request) -> SaveRequest | None:
    """What is saved of 700 tokens when the engine has computed them."""
    answer(half, asked)
    return next(iter(half.saves(scheduled(asked, BLOCKS, asked.num_tokens))), None)


def stored(client: KVStoreClient, half: SchedulerHalf, asked: Request) -> None:
    """Store what the engine computes of a request: random KV."""
    save = saved(half, asked)
    assert save is not None
    shape = (SPEC.layers, SPEC.kv_heads, CHUNK_TOKENS, SPEC.head_dim)
    kv = torch.randn(shape), torch.randn(shape)
    chunks = [NewChunk(chunk_id, lambda: kv) for chunk_id in save.text]
    assert client.store.put(SPEC, chunks).result() == 2


def test_the_same_adapter_is_reused_under_another_name_and_path(
    client: KVStoreClient, tmp_path: Path
) -> None:
    tokens, first, second = prompt(700, seed=1), started(client), started(client)
    stored(client, first, with_adapter(tokens, saved_adapter(tmp_path / "a", 1)))
    copy = with_adapter(tokens, saved_adapter(tmp_path / "b", 1), called="copy", lora_id=7)
    assert answer(second, copy) == (512, True)
    second.allocated(copy, BLOCKS[:4], 512)
    (load,) = second.take_loads()
    assert load.adapter is not None
    assert (load.adapter.lora_id, load.adapter.files.folder) == (7, str(tmp_path / "b"))
    for half in (first, second):
        half.close()


def test_other_adapters_never_meet_whatever_they_are_called(client: KVStoreClient, tmp_path: Path) -> None:
    tokens, first, second = prompt(700, seed=2), started(client), started(client, target_modules=["q_proj"])
    folder, other = saved_adapter(tmp_path / "a", 1), saved_adapter(tmp_path / "b", 2)
    stored(client, first, with_adapter(tokens, folder))
    assert answer(first, with_adapter(tokens, other, "other")) == (0, False)
    assert answer(first, request(tokens, "plain")) == (0, False)
    assert answer(first, with_adapter(tokens, folder, "same")) == (512, True)
    assert answer(second, with_adapter(tokens, folder)) == (0, False), "it applies a part of the adapter only"
    for half in (first, second):
        half.close()


def test_what_is_stored_without_an_adapter_is_not_read_with_one(
    half: SchedulerHalf, client: KVStoreClient, tmp_path: Path
) -> None:
    tokens = prompt(700, seed=3)
    put(client, tokens)
    save = saved(half, with_adapter(tokens, saved_adapter(tmp_path, 1)))
    assert save is not None
    assert save.adapter is not None
    assert not set(save.text) & set(client.chunk_ids(SPEC, tokens))


def test_an_adapter_that_cannot_be_read_costs_the_reuse_of_its_requests(
    half: SchedulerHalf, client: KVStoreClient, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    for number, path in enumerate((tmp_path / "empty", tmp_path / "gone", "somebody/adapter", "~/gone")):
        asked = with_adapter(prompt(700, seed=5), path, f"request {number}")
        assert saved(half, asked) is None
        assert half.matched_tokens(asked, 0) == (0, False)
        assert client.metrics.snapshot()["miss_adapter_unreadable"] == number + 1, (
            "counted once for each request"
        )


def test_an_adapter_that_could_not_be_read_is_read_again_later(
    half: SchedulerHalf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert saved(half, with_adapter(prompt(700, seed=6), tmp_path / "a", "first")) is None
    saved_adapter(tmp_path / "a", 1)
    assert saved(half, with_adapter(prompt(700, seed=6), tmp_path / "a", "at once")) is None
    monkeypatch.setattr(adapters, "_REPEATED_AFTER_S", 0.0)
    assert saved(half, with_adapter(prompt(700, seed=6), tmp_path / "a", "later")) is not None


def test_relative_paths_are_those_of_the_process(
    half: SchedulerHalf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved_adapter(tmp_path / "a", 1)
    monkeypatch.chdir(tmp_path)
    save = saved(half, with_adapter(prompt(700, seed=7), "a"))
    assert save is not None
    assert save.adapter is not None
    assert save.adapter.files.folder == str(tmp_path / "a"), "as vLLM opens it"


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Adapters are read when this is set."""
    may_go_on = threading.Event()

    def read(*arguments: Any) -> Any:
        may_go_on.wait(60)
        return read_adapter(*arguments)

    monkeypatch.setattr(adapters, "read_adapter", read)
    yield may_go_on
    may_go_on.set()


def test_a_slow_disk_holds_no_step_up(
    store: StoreProcess, tmp_path: Path, slow_disk: threading.Event
) -> None:
    """Such a request waits for a bounded time, is computed, and stored when its adapter is known."""
    client = connect(store.started["address"], cache_dir=tmp_path / "cache", lookup_timeout_s=0.5)
    half, tokens = started(client), prompt(900, seed=8)
    asked = with_adapter(tokens, saved_adapter(tmp_path, 1))
    begun_s = time.monotonic()
    assert half.matched_tokens(asked, 0) == (None, False)
    assert time.monotonic() - begun_s < 30, "the disk was waited for"
    assert answer(half, asked) == (0, False)
    assert time.monotonic() - begun_s >= client.settings.timeouts.lookup_s
    assert half.matched_tokens(asked, 0) == (0, False)
    assert client.metrics.snapshot()["miss_adapter_pending"] == 1
    assert half.saves(scheduled(asked, [1, 2, 3, 4], 400)) == ()
    slow_disk.set()
    known: Callable[[], bool] = lambda: half._adapters.find(asked.lora_request) is not None  # noqa: E731
    until(known)
    (save,) = half.saves(continued(asked, [5, 6, 7, 8], 500, 400))
    assert (save.first_chunk, save.chunks) == (0, 3)
    half.close()
    client.close()


def test_few_adapters_are_read_at_a_time(
    half: SchedulerHalf, tmp_path: Path, slow_disk: threading.Event
) -> None:
    many = [saved_adapter(tmp_path / str(number), number) for number in range(6)]
    asked = [
        with_adapter(prompt(300, seed=9), folder, folder.name, lora_id=number + 1)
        for number, folder in enumerate(many)
    ]
    for each in asked:
        assert half.matched_tokens(each, 0) == (None, False)
    assert sum(thread.name == "kvstore-adapter" for thread in threading.enumerate()) == 2
    slow_disk.set()
    assert [answer(half, each) for each in asked] == [(0, False)] * 6
    assert all(half.saves(scheduled(each, [1, 2, 3], 300)) for each in asked)


def test_a_calibration_is_not_used_for_another_model_than_its_own(
    store: StoreProcess, tmp_path: Path
) -> None:
    with connect(
        store.started["address"], cache_dir=tmp_path, encoding="medium-klt-pco", floor="medium"
    ) as client:
        half = started(client)
        asked = with_adapter(prompt(700, seed=10), saved_adapter(tmp_path / "a", 1))
        assert saved(half, asked) is None
        assert client.metrics.snapshot()["miss_adapter_uncalibrated"] == 1
        half.close()


def test_an_adapter_is_read_once_for_all_its_requests(
    half: SchedulerHalf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[str] = []

    def read(folder: str, *arguments: Any) -> Any:
        reads.append(os.path.basename(folder))  # noqa: PTH119
        return read_adapter(folder, *arguments)

    monkeypatch.setattr(adapters, "read_adapter", read)
    folder = saved_adapter(tmp_path / "a", 1)
    for number in range(5):
        assert (
            saved(half, with_adapter(prompt(700, seed=20 + number), folder, f"request {number}")) is not None
        )
    assert reads == ["a"]
