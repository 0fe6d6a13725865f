"""Threads of ours leave the processors to the engine's."""

import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from threadpoolctl import threadpool_info, threadpool_limits

from kvstore_client import connect
from kvstore_client.engines.transformers import CachedModel, RequestQueue
from kvstore_client.engines.transformers import call as call_module
from kvstore_client.engines.transformers.cache import arriving_cache
from kvstore_client.fetch import restore
from kvstore_client.new_chunk import NewChunk
from kvstore_client.reuse.pending import PendingGeneration
from kvstore_client.threads import run_apart, single_threaded
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


COUNT = """
import os, sys, threading, torch
from kvstore_client.threads import run_apart, single_threaded

def made_by(compute):
    def run():
        before = set(os.listdir("/proc/self/task"))  # some of them may be about to end
        compute()
        made.append(len(set(os.listdir("/proc/self/task")) - before))
    made = []
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return made[0]

torch.set_num_threads(3)
work = {
    "elementwise": lambda: torch.ones(1 << 20) * 2,
    "product": lambda: torch.ones(700, 700) @ torch.ones(700, 700),
}[sys.argv[1]]
print(made_by(work), made_by(single_threaded()(work)), torch.get_num_threads(), made_by(work))
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads of the system are counted in /proc")
@pytest.mark.parametrize("work", ["elementwise", "product"])
def test_no_team_of_threads_is_made(work: str) -> None:
    """In a process of its own, where nobody else's threads come and go."""
    counted = subprocess.run([sys.executable, "-c", COUNT, work], capture_output=True, text=True, check=True)
    assert counted.stdout.split() == ["2", "0", "3", "2"]


def test_the_thread_has_its_team_back_afterwards() -> None:
    with single_threaded():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2


def test_other_pools_stay_as_they_are() -> None:
    numpy_threads = [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]
    with threadpool_limits(1, user_api="blas"):
        limited = single_threaded()
        limited.__enter__()
    limited.__exit__(None, None, None)
    assert [p["num_threads"] for p in threadpool_info() if p["user_api"] == "blas"] == numpy_threads


def test_what_stores_and_what_fetches_computes_by_itself(
    cluster: ServedCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, int] = {}

    def gather() -> tuple[torch.Tensor, torch.Tensor]:
        seen["store"] = torch.get_num_threads()
        return random_kv()

    def noted(keys: torch.Tensor, tables: Sequence[RotaryTable], tokens: slice) -> None:
        seen["fetch"] = torch.get_num_threads()
        rotate(keys, tables, tokens)

    rotate = restore.rotate_layers_
    monkeypatch.setattr(restore, "rotate_layers_", noted)
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


def test_a_thread_that_stores_ends_with_each_chunk(cluster: ServedCluster) -> None:
    """Intel's OpenMP counts every thread that has computed as long as it lives, and slows down those of the engine."""
    threads: list[threading.Thread] = []

    def gather() -> tuple[torch.Tensor, torch.Tensor]:
        threads.append(threading.current_thread())
        return random_kv()

    with connect(cluster.address) as client:
        assert client.store.put(SPEC, [NewChunk(one, gather) for one in ids(2)]).result() == 2
        assert len(threads) == 2
        assert not any(thread.is_alive() for thread in threads)


def test_without_another_thread_it_is_computed_in_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_thread_left(_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", no_thread_left)
    assert run_apart("test", threading.get_ident) == threading.get_ident()


def test_what_fails_apart_is_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        run_apart("test", lambda: 1 // 0)


def test_a_queue_starts_fetches_by_itself(cluster: ServedCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    begin = CachedModel.begin

    def noted(self: CachedModel, *arguments: Any, **named: Any) -> PendingGeneration:
        seen.append(torch.get_num_threads())
        return begin(self, *arguments, **named)

    prompt = random_prompt(600, seed=43)
    with connect(cluster.address) as client:
        cached = CachedModel(tiny_model(), client)
        cached.generate(prompt, **GREEDY)
        client.store.flush()
        monkeypatch.setattr(CachedModel, "begin", noted)
        queue = RequestQueue(cached)
        queue.submit(prompt, **GREEDY).result(60)
        queue.close()
        cached.close()
    assert seen == [1]


def test_a_cache_that_was_not_asked_for_is_empty_afterwards(
    cluster: ServedCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who kept a reference to it must not find the KV of another prompt."""
    prompt, seen = random_prompt(600, seed=44), []

    def keep(*arguments: Any) -> Any:
        seen.append(arriving_cache(*arguments))
        return seen[-1]

    with connect(cluster.address) as client:
        cached = CachedModel(tiny_model(), client)
        cached.generate(prompt, **GREEDY)
        client.store.flush()
        monkeypatch.setattr(call_module, "arriving_cache", keep)
        cached.generate(prompt, **GREEDY)
        assert cached.last_report.reused_tokens == 512
        assert [len(cache.layers) for cache in seen] == [0]
        cached.close()


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
