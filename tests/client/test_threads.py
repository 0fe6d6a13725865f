"""Threads of ours leave the processors to the engine's."""

import threading
from collections.abc import Callable, Iterator

import psutil
import pytest
import torch

from kvstore_client import connect
from kvstore_client.engines.transformers import CachedModel
from kvstore_client.fetch import restore
from kvstore_client.store import NewChunk
from kvstore_client.threads import single_threaded
from kvstore_codec.rope import RotaryTable
from tests.client.chunks import SPEC, ids, random_kv
from tests.client.conftest import ServedCluster
from tests.client.models import random_prompt, tiny_model

GREEDY = {"do_sample": False, "max_new_tokens": 1}


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def threads_made_by(compute: Callable[[], object]) -> int:
    """How many threads of the system there are more while a new thread of ours has computed, and is still there."""
    made: list[int] = []

    def run() -> None:
        before = psutil.Process().num_threads()
        compute()
        made.append(psutil.Process().num_threads() - before)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return made[0]


def large_operation() -> torch.Tensor:
    return torch.ones(1 << 20) * 2


def test_no_team_of_threads_is_made() -> None:
    assert threads_made_by(large_operation) == 1
    assert threads_made_by(single_threaded()(large_operation)) == 0
    assert torch.get_num_threads() == 2


def test_the_thread_has_its_team_back_afterwards() -> None:
    with single_threaded():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2


def test_what_stores_and_what_fetches_computes_by_itself(
    cluster: ServedCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, int] = {}

    def gather() -> tuple[torch.Tensor, torch.Tensor]:
        seen["store"] = torch.get_num_threads()
        return random_kv()

    def noted(keys: torch.Tensor, table: RotaryTable) -> None:
        seen["fetch"] = torch.get_num_threads()
        rotate_(keys, table)

    rotate_ = restore.rotate_
    monkeypatch.setattr(restore, "rotate_", noted)
    prompt = random_prompt(600, seed=40)
    with connect(cluster.address) as client:
        client.store.put(SPEC, [NewChunk(ids(1)[0], gather)]).result()
        cached = CachedModel(tiny_model(), client)
        for _ in range(2):
            cached.generate(prompt, **GREEDY)
            client.store.flush()
        assert cached.last_report.reused_tokens == 512
        cached.close()
    assert seen == {"store": 1, "fetch": 1}
    assert torch.get_num_threads() == 2


def test_what_waits_to_be_stored_outlives_the_buffers_it_was_computed_in(cluster: ServedCluster) -> None:
    """The cache of a call that is not given to the caller is not copied; what is stored of it must be."""
    long, other = random_prompt(1100, seed=41), random_prompt(1100, seed=42)
    model, go_on = tiny_model(), threading.Event()

    def gather() -> tuple[torch.Tensor, torch.Tensor]:
        go_on.wait(60)
        return random_kv()

    with connect(cluster.address, pool_bytes=1 << 24) as client:
        cached = CachedModel(model, client)
        for prompt in (long[:, :600], other[:, :600]):
            cached.generate(prompt, **GREEDY)
        client.store.flush()
        client.store.put(SPEC, [NewChunk(ids(1)[0], gather)])  # what comes behind it waits
        for prompt in (long, other, other):
            cached.generate(prompt, **GREEDY)
            assert cached.last_report.reused_tokens == 512
        go_on.set()
        client.store.flush()
        plain = model.generate(long, return_dict_in_generate=True, **GREEDY).past_key_values
        got = cached.generate(long, return_dict_in_generate=True, **GREEDY).past_key_values
        assert cached.last_report.reused_tokens == 1024
        cached.close()
    for layer, expected in zip(got.layers, plain.layers, strict=True):
        torch.testing.assert_close(layer.keys, expected.keys)
        torch.testing.assert_close(layer.values, expected.values)
