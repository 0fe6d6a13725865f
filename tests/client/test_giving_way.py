"""New chunks are encoded when the engine does not compute, where both share a processor."""

import math
import time
from collections.abc import Iterator
from concurrent.futures import wait
from pathlib import Path

import pytest
import torch

from kvstore_client import connect
from kvstore_client.giving_way import GivingWay
from kvstore_client.new_chunk import NewChunk
from kvstore_client.planning import Links
from kvstore_client.settings import ClientSettings
from tests.client.chunks import SPEC, ids, random_kv
from tests.client.conftest import ServedCluster, served_cluster

WAIT_S = 20
POLLS_S = 0.3
"""Long enough for a thread that does not wait to have begun."""


class Asked:
    """Ends a wait when it was asked so many times; how often it was asked says whether there was a wait."""

    def __init__(self, times: int) -> None:
        self.times, self.limit = 0, times

    def __call__(self) -> bool:
        self.times += 1
        return self.times >= self.limit


def waited(links: Links, *, waiting_bytes: int = 0, age_s: float = 0.0, **settings: float) -> bool:
    asked = Asked(3)
    given: dict[str, float] = {"store_idle_wait_s": 1e6, "put_timeout_s": 1e6} | settings
    queued_s = time.monotonic() - age_s
    GivingWay(links, ClientSettings(**given)).wait(
        1, queued_s, waiting_bytes=lambda: waiting_bytes, is_over=asked
    )
    assert asked.times in (0, asked.limit)
    return asked.times > 0


def test_only_an_engine_that_computes_is_given_way() -> None:
    links = Links()
    assert not waited(links)
    with links.computing():
        assert waited(links)
        assert not waited(links, store_idle_wait_s=0)


def test_an_engine_computes_still_between_two_tokens() -> None:
    now_s = 0.0
    links = Links(lambda: now_s)
    with links.computing():
        now_s = 1.0
    now_s = 1.01
    assert waited(links)
    now_s = 1.2
    assert not waited(links)


def test_half_of_the_backlog_stays_free_for_new_chunks() -> None:
    links = Links()
    with links.computing():
        assert waited(links, waiting_bytes=49, store_backlog_bytes=100)
        assert not waited(links, waiting_bytes=50, store_backlog_bytes=100)
        assert not waited(links, waiting_bytes=200, store_backlog_bytes=100)


def test_a_wait_ends_when_the_backlog_fills_meanwhile() -> None:
    links, never, waiting = Links(), Asked(1_000_000), iter(range(0, 1000, 10))
    settings = ClientSettings(store_idle_wait_s=1e6, put_timeout_s=1e6, store_backlog_bytes=100)
    with links.computing():
        GivingWay(links, settings).wait(
            1, time.monotonic(), waiting_bytes=lambda: next(waiting), is_over=never
        )
    assert never.times == 5


def test_a_chunk_that_was_queued_long_ago_waits_no_longer() -> None:
    links = Links()
    with links.computing():
        assert waited(links, age_s=9, put_timeout_s=20)
        assert not waited(links, age_s=10, put_timeout_s=20)


def test_chunks_that_are_stored_together_leave_half_of_their_time_for_storing() -> None:
    links, never = Links(), Asked(1_000_000)
    giving_way = GivingWay(links, ClientSettings(store_idle_wait_s=1e6, put_timeout_s=0.2))
    with links.computing():
        for _ in range(10):
            giving_way.wait(10, math.inf, waiting_bytes=lambda: 0, is_over=never)
    assert 0 < never.times < never.limit


def test_an_engine_is_rarely_interrupted() -> None:
    """A thread that wakes up costs an engine on few cores more than the look itself."""
    links, never = Links(), Asked(1_000_000)
    with links.computing():
        GivingWay(links, ClientSettings(store_idle_wait_s=0.5)).wait(
            1, time.monotonic(), waiting_bytes=lambda: 0, is_over=never
        )
    assert 1 <= never.times <= 5


@pytest.mark.timeout(60)
def test_a_chunk_is_not_touched_while_the_engine_computes(cluster: ServedCluster) -> None:
    with connect(cluster.address, store_idle_wait_s=1000) as client:
        computes: list[bool] = []

        def gather() -> tuple[torch.Tensor, torch.Tensor]:
            computes.append(client.links.is_computing)
            return random_kv(0)

        with client.links.computing():
            stored = client.store.put(SPEC, [NewChunk(ids(1)[0], gather)])
            assert not wait([stored], POLLS_S).done
        assert stored.result(WAIT_S) == 1
        assert computes == [False]


@pytest.mark.timeout(60)
def test_closing_does_not_wait_for_the_engine(cluster: ServedCluster) -> None:
    with connect(cluster.address, store_idle_wait_s=1000) as client, client.links.computing():
        stored = client.store.put(SPEC, [NewChunk(ids(1)[0], lambda: random_kv(0))])
        client.close()
        assert stored.result(0) == 1


@pytest.mark.timeout(60)
def test_flushing_does_not_wait_for_the_engine(cluster: ServedCluster) -> None:
    with connect(cluster.address, store_idle_wait_s=1000, put_timeout_s=1000) as client:
        with client.links.computing():
            chunks = [NewChunk(one, lambda: random_kv(0)) for one in ids(3)]
            stored = client.store.put(SPEC, chunks)
            client.store.flush()
            assert stored.result(0) == 3
            stored = client.store.put(SPEC, [NewChunk(ids(1, seed=1)[0], lambda: random_kv(0))])
            assert not wait([stored], POLLS_S).done, "a flush that has ended hurries nobody"
        assert stored.result(WAIT_S) == 1


@pytest.fixture
def small(tmp_path: Path) -> Iterator[ServedCluster]:
    with served_cluster(tmp_path, memory_bytes=4 << 20) as served:
        yield served


def test_chunks_behind_the_cut_of_a_text_do_not_wait(
    small: ServedCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    with connect(small.address, store_idle_wait_s=1000) as client:
        waits, encoded = 0, 0

        def idle_s() -> float:
            nonlocal waits
            waits += 1
            return math.inf

        def gather() -> tuple[torch.Tensor, torch.Tensor]:
            nonlocal encoded
            encoded += 1
            return random_kv(encoded)

        monkeypatch.setattr(client.links, "idle_s", idle_s)
        text = ids(60)
        assert client.store.put(SPEC, [NewChunk(one, gather) for one in text]).result(WAIT_S) > 0
        assert client.metrics.snapshot()["miss_store_text_cut"] > 0
        assert encoded < len(text)
        # The text may be cut just when a chunk has waited.
        assert waits in (encoded, encoded + 1)
