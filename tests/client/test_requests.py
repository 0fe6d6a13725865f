"""Several requests for one model, of which some wait for KV over a slow link."""

import random
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from kvstore_bench.shaping import ShapedLink
from kvstore_client import connect
from kvstore_client.engines.transformers import CachedModel, RequestQueue
from tests.client.conftest import ServedCluster, served_cluster
from tests.client.models import random_prompt, tiny_model
from tests.client.test_fetch_leaks import eventually

GREEDY = {"do_sample": False, "max_new_tokens": 4}
FAST_BPS, SLOW_BPS = 10e9, 0.5e6
PROMPT_S = 20.0
"""Half of what a long prompt's KV takes at SLOW_BPS."""
pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass
class Setup:
    cluster: ServedCluster
    cached: CachedModel
    queue: RequestQueue
    link: ShapedLink
    long: list[torch.Tensor]
    """Prompts of 8 stored chunks: 2.6 MB of KV."""
    short: list[torch.Tensor]
    """Prompts of which nothing is stored."""

    def expected(self, prompt: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = self.cached.model.generate(prompt, **GREEDY)
        return answer

    def counted(self, name: str) -> int:
        return self.cached.client.metrics.snapshot().get(name, 0)


@pytest.fixture
def setup(tmp_path: Path) -> Iterator[Setup]:
    long = [random_prompt(256 * 8 + 20, seed=seed) for seed in range(3)]
    short = [random_prompt(40, seed=10), random_prompt(300, seed=11)]
    with served_cluster(tmp_path, bulk=True) as cluster:
        with connect(cluster.address) as writer:
            cached = CachedModel(tiny_model(), writer)
            for prompt in long:
                cached.generate(prompt, **GREEDY)
            writer.store.flush()
            cached.close()
        endpoint, bulk = cluster.servers[0].address, cluster.bulk[0].address
        with (
            ShapedLink(bulk, bandwidth_bps=FAST_BPS) as link,
            connect(
                cluster.address,
                routes={endpoint: endpoint, bulk: link.address},
                fetch_timeout_s=120.0,
                stall_timeout_s=10.0,
            ) as client,
        ):
            cached = CachedModel(tiny_model(), client, store=False)
            assert cached.canary.refusal(cached.spec, wait_s=30) is None
            queue = RequestQueue(cached)
            yield Setup(cluster, cached, queue, link, long, short)
            queue.close()
            cached.close()
            cluster.check_nothing_is_held()
            names = [thread.name for thread in threading.enumerate()]
            assert not [n for n in names if n in ("kvstore-engine", "kvstore-admission", "kvstore-restore")]


def test_requests_are_answered_as_by_the_model(setup: Setup) -> None:
    answers = [setup.queue.submit(prompt, **GREEDY) for prompt in (*setup.long, *setup.short)]
    for prompt, answer in zip((*setup.long, *setup.short), answers, strict=True):
        assert torch.equal(answer.result(30), setup.expected(prompt))
    assert setup.counted("chunks_delivered") == 24
    assert setup.counted("waiting_for_kv") == 0


def test_what_a_request_finds_counts_once(setup: Setup) -> None:
    """A queue looks twice: whether to wait for KV, and when it is the request's turn to fetch."""
    node = setup.cluster.nodes[0]
    before = node.stats().counters["hits"]
    setup.queue.submit(setup.long[0], **GREEDY).result(30)
    assert setup.counted("chunks_matched_exact") == 8
    deadline = time.monotonic() + 30  # a node is told what is used without waiting for it
    while node.stats().counters["hits"] == before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert node.stats().counters["hits"] == before + 8


def test_a_slow_fetch_does_not_delay_who_needs_none(setup: Setup) -> None:
    setup.link.set_bandwidth(SLOW_BPS)
    slow = setup.queue.submit(setup.long[0], **GREEDY)
    assert eventually(lambda: setup.counted("waiting_for_kv") == 1)
    started = time.monotonic()
    for prompt in setup.short:
        assert torch.equal(setup.queue.submit(prompt, **GREEDY).result(60), setup.expected(prompt))
    assert time.monotonic() - started < PROMPT_S
    assert not slow.done()
    assert setup.counted("waiting_for_kv") == 1
    setup.link.set_bandwidth(FAST_BPS)
    assert torch.equal(slow.result(20), setup.expected(setup.long[0]))
    assert setup.cached.last_report.reused_tokens == 256 * 8


def test_a_fetch_that_fails_is_computed(setup: Setup) -> None:
    setup.link.set_bandwidth(SLOW_BPS)
    answer = setup.queue.submit(setup.long[0], **GREEDY)
    assert eventually(lambda: setup.counted("waiting_for_kv") == 1)
    setup.link.cut()
    assert torch.equal(answer.result(30), setup.expected(setup.long[0]))
    assert setup.cached.last_report.reused_tokens < 256 * 8
    setup.link.restore()
    setup.link.set_bandwidth(FAST_BPS)


def test_cancelled_requests_free_what_they_hold(setup: Setup) -> None:
    setup.link.set_bandwidth(SLOW_BPS)
    answers = [setup.queue.submit(prompt, **GREEDY) for prompt in setup.long]
    time.sleep(0.3)
    assert all(answer.cancel() for answer in answers)
    setup.cluster.check_nothing_is_held()
    assert setup.counted("waiting_for_kv") == 0
    setup.link.set_bandwidth(FAST_BPS)
    assert torch.equal(setup.queue.submit(setup.long[1], **GREEDY).result(20), setup.expected(setup.long[1]))


def test_closing_cancels_who_waits(setup: Setup) -> None:
    setup.link.set_bandwidth(SLOW_BPS)
    answers = [setup.queue.submit(prompt, **GREEDY) for prompt in setup.long]
    time.sleep(0.2)
    started = time.monotonic()
    setup.queue.close()
    assert time.monotonic() - started < PROMPT_S
    assert all(answer.cancelled() for answer in answers)
    with pytest.raises(ValueError, match="closed"):
        setup.queue.submit(setup.short[0], **GREEDY)


def test_what_the_model_raises_comes_out_of_the_future(setup: Setup) -> None:
    with pytest.raises(ValueError, match="nonsense"):
        setup.queue.submit(setup.short[0], nonsense=1).result(60)
    assert torch.equal(
        setup.queue.submit(setup.short[0], **GREEDY).result(60), setup.expected(setup.short[0])
    )


def test_a_callback_that_ends_its_thread_keeps_nobody_waiting(setup: Setup) -> None:
    def leave(_answer: object) -> None:
        raise SystemExit

    setup.link.set_bandwidth(SLOW_BPS)
    first = setup.queue.submit(setup.long[0], **GREEDY)
    first.add_done_callback(leave)
    setup.link.set_bandwidth(FAST_BPS)
    assert torch.equal(first.result(20), setup.expected(setup.long[0]))
    assert torch.equal(
        setup.queue.submit(setup.short[0], **GREEDY).result(20), setup.expected(setup.short[0])
    )


def test_many_requests_from_many_threads(setup: Setup) -> None:
    setup.link.set_bandwidth(200e6)
    prompts = [*setup.long, *setup.short]
    expected = [setup.expected(prompt) for prompt in prompts]
    wrong: list[int] = []

    def ask(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(4):
            index = chance.randrange(len(prompts))
            answer = setup.queue.submit(prompts[index], **GREEDY)
            if chance.random() < 0.2 and answer.cancel():
                continue
            if not torch.equal(answer.result(60), expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert setup.counted("waiting_for_kv") == 0
