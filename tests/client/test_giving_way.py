"""New chunks are encoded when the engine does not compute, where both share a processor."""

from concurrent.futures import wait

import pytest
import torch

from kvstore_client import connect
from kvstore_client.giving_way import GivingWay
from kvstore_client.planning import Links
from kvstore_client.settings import ClientSettings
from kvstore_client.store import NewChunk
from tests.client.chunks import SPEC, ids, random_kv
from tests.client.conftest import ServedCluster

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


def waited(links: Links, *, chunks: int = 1, waiting_bytes: int = 0, **settings: float) -> bool:
    asked = Asked(3)
    given: dict[str, float] = {"store_idle_wait_s": 1e6, "put_timeout_s": 1e6} | settings
    GivingWay(links, ClientSettings(**given)).wait(chunks, waiting_bytes, is_over=asked)
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


def test_a_full_backlog_waits_for_nobody() -> None:
    links = Links()
    with links.computing():
        assert waited(links, waiting_bytes=99, store_backlog_bytes=100)
        assert not waited(links, waiting_bytes=100, store_backlog_bytes=100)
        assert not waited(links, waiting_bytes=200, store_backlog_bytes=100)


def test_chunks_that_are_stored_together_leave_half_of_their_time_for_storing() -> None:
    links, never = Links(), Asked(1_000_000)
    giving_way = GivingWay(links, ClientSettings(store_idle_wait_s=1e6, put_timeout_s=0.2))
    with links.computing():
        for _ in range(10):
            giving_way.wait(10, 0, is_over=never)
    assert 0 < never.times < never.limit


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
