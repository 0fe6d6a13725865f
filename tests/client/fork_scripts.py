"""Processes that fork after they have connected, for test_fork: python -m tests.client.fork_scripts NAME ADDRESS.

The service is in another process, as it is for a worker. Each script ends with status 0 and prints "done" when all
that it checks holds.
"""

import itertools
import multiprocessing
import os
import select
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from kvstore_client import KVStoreClient, connect
from kvstore_client.engines.transformers import CachedModel, RequestQueue
from kvstore_client.engines.transformers.spec import spec_of
from kvstore_client.fork import GATE
from kvstore_client.pages import PageNamespace
from tests.client.models import random_prompt, tiny_model

GREEDY = {"max_new_tokens": 2, "do_sample": False}
PROMPT = random_prompt(700, seed=1)


def sockets() -> set[str]:
    """Those that this process has open, but for the pipes between the processes of the test."""
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            target = str(entry.readlink())
        except OSError:
            continue
        if target.startswith("socket:"):
            found.add(target)
    return found


def forked(work: Callable[[], object]) -> int:
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    return child


def ended_well(child: int, within_s: float = 60.0) -> None:
    until_s = time.monotonic() + within_s
    while time.monotonic() < until_s:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            assert status == 0, f"the child ended with {status}"
            return
        time.sleep(0.02)
    os.kill(child, 9)
    raise AssertionError(f"the child still runs after {within_s} s")


def counts(client: KVStoreClient) -> dict[str, int]:
    return client.metrics.snapshot()


def preload(address: str) -> None:
    """Client and model are made and used before the fork, as by gunicorn --preload; parent and children go on."""
    torch.set_num_threads(1)
    client = connect(address, fetch_policy="fixed")
    cached = CachedModel(tiny_model("llama"), client)
    answer = cached.generate(PROMPT, **GREEDY)
    client.store.flush()
    parents = sockets()

    def ask(seed: int) -> None:
        assert counts(client) == {}
        assert torch.equal(cached.generate(PROMPT, **GREEDY), answer)
        assert cached.last_report.reused_tokens == 512, cached.last_report.why_not
        assert sockets()
        assert not sockets() & parents
        cached.generate(random_prompt(300, seed=seed), **GREEDY)

    def flush_and_leave() -> None:
        ask(11)
        client.store.flush()
        assert counts(client)["chunks_stored"] == 1
        client.close()
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("kvstore")]

    def leave_by_exit() -> None:
        ask(12)
        sys.exit(0)  # atexit has what waits stored

    def fork_again() -> None:
        ask(13)
        ended_well(forked(flush_and_leave_again))

    def flush_and_leave_again() -> None:
        assert counts(client) == {}
        cached.generate(random_prompt(300, seed=14), **GREEDY)
        client.store.flush()
        assert counts(client)["chunks_stored"] == 1

    for work in (flush_and_leave, leave_by_exit, fork_again):
        ended_well(forked(work))
        assert torch.equal(cached.generate(PROMPT, **GREEDY), answer)
        assert cached.last_report.reused_tokens == 512, cached.last_report.why_not
    worker = multiprocessing.get_context("fork").Process(target=ask, args=(15,))
    worker.start()
    worker.join(60)
    assert worker.exitcode == 0
    for seed in (11, 12, 14, 15):
        cached.generate(random_prompt(300, seed=seed), **GREEDY)
        assert cached.last_report.reused_tokens == 256, seed
    client.store.flush()
    client.close()


def busy(address: str) -> None:
    """Forks while other threads of the parent look up, fetch and store."""
    torch.set_num_threads(1)
    client = connect(address, fetch_policy="fixed")
    model = tiny_model("llama")
    cached = CachedModel(model, client)
    answer = cached.generate(PROMPT, **GREEDY)
    client.store.flush()
    ids = client.chunk_ids(cached.spec, PROMPT[0].tolist())
    over, failures, seeds = threading.Event(), list[str](), itertools.count(100)

    def go_on() -> None:
        mine = CachedModel(model, client)
        while not over.is_set():
            if (
                not torch.equal(mine.generate(PROMPT, **GREEDY), answer)
                or mine.last_report.reused_tokens != 512
            ):
                failures.append(str(mine.last_report))
            mine.generate(random_prompt(300, seed=next(seeds)), **GREEDY)

    def look_up() -> None:
        while not over.is_set():
            client.release(client.match(cached.spec, ids))

    threads = [threading.Thread(target=go_on), threading.Thread(target=look_up)]
    for thread in threads:
        thread.start()

    def child() -> None:
        match = client.match(cached.spec, ids)
        assert len(match.chunks) == 2, match.why_not
        client.release(match)
        cached.generate(PROMPT, **GREEDY)
        assert cached.last_report.reused_tokens == 512, cached.last_report.why_not
        client.close()

    for _ in range(10):
        ended_well(forked(child))
    over.set()
    for thread in threads:
        thread.join()
    assert failures == []
    client.close()


def halfway(address: str) -> None:
    """What was begun before the fork ends in the child as well; a queue answers in both; threads of torch stay free."""
    client = connect(address, fetch_policy="fixed")
    cached = CachedModel(tiny_model("llama", hidden_size=512, intermediate_size=512), client)
    with RequestQueueOf(cached) as queue:
        begun = cached.begin(PROMPT, **GREEDY)

        def child() -> None:
            torch.set_num_threads(2)
            answer = cached.finish(begun)
            assert torch.equal(queue.submit(PROMPT, **GREEDY).result(60), answer)
            client.store.flush()
            assert counts(client)["chunks_stored"] >= 2
            queue.close()
            client.close()

        ended_well(forked(child))
        answer = cached.finish(begun)
        assert torch.equal(queue.submit(PROMPT, **GREEDY).result(60), answer)
    client.close()


class RequestQueueOf:
    def __init__(self, cached: CachedModel) -> None:
        self._queue = RequestQueue(cached)

    def __enter__(self) -> RequestQueue:
        return self._queue

    def __exit__(self, *_: object) -> None:
        self._queue.close()


def paged(address: str) -> None:
    """A child has a page store of its own, whose descriptor wakes nobody in its parent, and the other way round."""
    client = connect(address, lookup_timeout_s=10.0)
    pages = client.pages(PageNamespace(b"model", "fork"))
    keys, bodies = [b"0", b"1"], [b"zero", b"one!"]
    assert pages.put(keys, bodies).run == 2
    assert pages.exists(keys) == 2

    def works() -> None:
        views = [bytearray(4), bytearray(4)]
        job = pages.submit_get(keys, views)
        assert select.select([pages.fileno()], [], [], 30)[0]
        ((finished, result),) = pages.finished()
        assert (finished, result.run) == (job, 2), result
        assert views == bodies

    def child() -> None:
        works()
        pages.submit_exists(keys)  # its result stays in the child
        assert select.select([pages.fileno()], [], [], 30)[0]
        client.close()

    ended_well(forked(child))
    assert select.select([pages.fileno()], [], [], 0)[0] == []
    works()
    pages.unlock(keys)
    client.close()


class Unending:
    """A call that does not end. One of gRPC's own would crash the child at times, which is why it is refused."""

    def add_done_callback(self, _ended: Callable[..., object]) -> None:
        pass


def refused(_: str) -> None:
    """A call that does not end in time keeps the child from using gRPC, and it says so."""
    spec = spec_of(tiny_model("llama"))
    client = connect("127.0.0.1:1")
    GATE.intercept_unary_unary(lambda *_: Unending(), None, None)

    def child() -> None:
        parents = sockets()
        match = client.match(spec, client.chunk_ids(spec, PROMPT[0].tolist()))
        assert str(match.why_not).startswith("forked: "), match.why_not
        assert counts(client) == {"miss_closed": 1, "chunks_missing": 0}
        client.close()
        assert sockets() == parents  # nobody was called

    ended_well(forked(child))
    client.close()


if __name__ == "__main__":
    {"preload": preload, "busy": busy, "halfway": halfway, "refused": refused, "paged": paged}[sys.argv[1]](
        sys.argv[2]
    )
    print("done")
