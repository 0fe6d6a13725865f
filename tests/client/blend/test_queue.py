"""Prompts in segments among the requests of a queue, and many of them."""

import gc
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from kvstore_bench.shaping import ShapedLink
from kvstore_client import connect
from kvstore_client.engines.transformers import CachedModel, RequestQueue
from kvstore_client.fetch import Fetch
from kvstore_client.recompute import Recompute
from kvstore_client.settings import SelectorName
from kvstore_codec.errors import InvalidTokensError
from tests.client.blend.library import GREEDY, PATIENT, QUESTION, SYSTEM, Library, joined, text
from tests.client.blend.reference import sharp
from tests.client.conftest import served_cluster
from tests.client.test_fetch_leaks import client_threads, eventually, pooled_bytes, resident_bytes

PAPERS = [text(512, 700 + seed) for seed in range(5)]
SEGMENTS = [SYSTEM, *reversed(PAPERS), QUESTION]
FAST_BPS, SLOW_BPS = 10e9, 4e6


@dataclass
class Queued(Library):
    queue: RequestQueue
    link: ShapedLink


@pytest.fixture
def queued(tmp_path: Path, one_thread: None) -> Iterator[Queued]:
    """Nothing new is stored."""
    model = sharp("llama")
    with served_cluster(tmp_path, bulk=True) as cluster:
        with connect(cluster.address, **PATIENT) as writer:
            cached = CachedModel(model, writer)
            cached.generate(joined(SYSTEM, *PAPERS, QUESTION)[0], **GREEDY)
            writer.store.flush()
            cached.close()
        endpoint, bulk = cluster.servers[0].address, cluster.bulk[0].address
        with (
            ShapedLink(bulk, bandwidth_bps=FAST_BPS) as link,
            connect(cluster.address, routes={endpoint: endpoint, bulk: link.address}, **PATIENT) as client,
        ):
            cached = CachedModel(model, client, store=False)
            assert cached.canary.refusal(cached.spec, wait_s=30) is None
            queue = RequestQueue(cached)
            yield Queued(cluster, client, cached, queue, link)
            queue.close()
            cached.close()
            cluster.check_nothing_is_held()


def test_a_queue_answers_as_generate_does(queued: Queued) -> None:
    prompt, lengths = joined(*SEGMENTS)
    repairs = [None, Recompute(SelectorName.FIRST_K, 0.3, drift=False), Recompute(ratio=1.0)]
    expected = [queued.answer(*SEGMENTS, recompute=recompute) for recompute in repairs]
    before = queued.counted("chunks_delivered")
    answers = [queued.queue.submit(prompt, segments=lengths, recompute=r, **GREEDY) for r in repairs]
    for answer, right in zip(answers, expected, strict=True):
        assert torch.equal(answer.result(30), right)
    # Of the one that is computed whole, the exact beginning.
    assert queued.counted("chunks_delivered") - before == 2 * 11 + 1
    assert queued.counted("waiting_for_kv") == 0
    assert queued.cached.last_report.bypassed is None


def test_who_waits_for_segments_is_passed_by_who_does_not(queued: Queued) -> None:
    prompt, lengths = joined(*SEGMENTS)
    expected = queued.answer(*SEGMENTS)
    queued.link.set_bandwidth(SLOW_BPS)
    slow = queued.queue.submit(prompt, segments=lengths, **GREEDY)
    assert eventually(lambda: queued.counted("waiting_for_kv") == 1)
    time.sleep(0.1)
    new = text(300, 800)
    answer = queued.queue.submit(new[None], segments=[100, 200], **GREEDY).result(60)
    assert torch.equal(answer, queued.plain(new))
    assert not slow.done()
    assert queued.counted("waiting_for_kv") == 1
    queued.link.set_bandwidth(FAST_BPS)
    assert torch.equal(slow.result(30), expected)
    assert queued.cached.last_report.approximate_tokens == 2560


def test_segments_that_do_not_make_the_prompt_are_refused_at_once(queued: Queued) -> None:
    prompt, lengths = joined(*SEGMENTS)
    for wrong in ([1], [*lengths, 1], []):
        with pytest.raises(InvalidTokensError):
            queued.queue.submit(prompt, segments=wrong, **GREEDY)
    with pytest.raises(TypeError):
        queued.queue.submit(prompt, segments=[1.5], **GREEDY)
    assert torch.equal(
        queued.queue.submit(prompt, segments=lengths, **GREEDY).result(30), queued.answer(*SEGMENTS)
    )


def test_buffers_are_counted(queued: Queued) -> None:
    """The whole prompt's: what is computed goes into them, too. Two do not fit, so one waits for the other."""
    prompt, lengths = joined(*SEGMENTS)
    size_bytes = prompt.numel() * queued.cached.spec.kv_bytes_per_token
    begun = queued.cached.begin(prompt, segments=lengths)
    assert begun.buffer_bytes >= size_bytes
    queued.cached.cancel(begun)
    queued.link.set_bandwidth(SLOW_BPS)
    queue = RequestQueue(queued.cached, buffer_bytes=2 * size_bytes - 1)
    leases = [queue.submit(prompt, segments=lengths, **GREEDY) for _ in range(2)]
    assert eventually(lambda: queued.cluster.nodes[0].stats().leases == 1)
    time.sleep(0.2)
    assert queued.cluster.nodes[0].stats().leases == 1
    queue.close()
    assert all(answer.cancelled() for answer in leases)
    queued.link.set_bandwidth(FAST_BPS)


def test_cancelled_requests_free_what_they_hold(queued: Queued) -> None:
    prompt, lengths = joined(*SEGMENTS)
    queued.link.set_bandwidth(SLOW_BPS)
    answers = [queued.queue.submit(prompt, segments=lengths, **GREEDY) for _ in range(3)]
    time.sleep(0.3)
    assert all(answer.cancel() for answer in answers)
    queued.cluster.check_nothing_is_held()
    assert queued.counted("waiting_for_kv") == 0
    queued.link.set_bandwidth(FAST_BPS)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("count", [14, pytest.param(200, marks=pytest.mark.slow)])
def test_many_requests_leave_nothing_behind(queued: Queued, count: int) -> None:
    """Of all selectors, some cancelled, some refused, some with a prompt of which nothing is stored."""
    generator = torch.Generator().manual_seed(9)
    names = list(SelectorName)

    def ask(number: int) -> None:
        order = torch.randperm(len(PAPERS), generator=generator)[: 1 + number % 5].tolist()
        prompt, lengths = joined(SYSTEM, *(PAPERS[i] for i in order), text(10 + number % 7, 900 + number))
        recompute = Recompute(names[number % len(names)], (0.0, 0.15, 0.4, 1.0)[number % 4], number % 3 > 0)
        if number % 9 == 5:
            with pytest.raises(InvalidTokensError):
                queued.cached.generate(prompt, segments=[1, 2], **GREEDY)
        elif number % 9 == 7:
            queued.cached.cancel(queued.cached.begin(prompt, segments=lengths, recompute=recompute))
        elif number % 2:
            asked.append(queued.queue.submit(prompt, segments=lengths, recompute=recompute, **GREEDY))
        else:
            asked.append(queued.queue.submit(prompt, **GREEDY))
            queued.cached.question_log_probabilities(prompt, segments=lengths, recompute=recompute)

    def ask_all(numbers: range) -> None:
        for number in numbers:
            ask(number)
            if len(asked) == 4:
                for answer in asked:
                    answer.result(60)
                asked.clear()
        for answer in asked:
            answer.result(60)
        asked.clear()

    asked: list[object] = []
    ask_all(range(10))
    queued.client._view.refresh()  # its thread stays
    threads, resident = steady_threads(), resident_bytes()
    ask_all(range(10, 10 + count))
    queued.cluster.check_nothing_is_held()
    assert eventually(lambda: steady_threads() == threads), steady_threads()
    gc.collect()
    assert not [one for one in gc.get_objects() if type(one) is Fetch]
    assert pooled_bytes(queued.client) <= queued.client.settings.fetch.pool_bytes
    assert resident_bytes() - resident < 64 << 20
    assert queued.counted("miss_internal_error") == 0
    assert queued.counted("waiting_for_kv") == 0
    names_left = Counter(thread.name for thread in threading.enumerate())
    assert not names_left["kvstore-restore"] + names_left["kvstore-receive"] + names_left["kvstore-watch"]


def steady_threads() -> Counter[str]:
    """Those of the client, when none of a fetch is left."""
    eventually(lambda: not any(name.startswith(("kvstore-re", "kvstore-watch")) for name in client_threads()))
    return client_threads()
