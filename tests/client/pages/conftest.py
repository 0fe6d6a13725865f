"""A real cluster of two nodes, and page stores of clients of it."""

import select
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvstore_bench.shaping import ShapedLink
from kvstore_client import KVStoreClient, connect
from kvstore_client.pages import JobId, PageNamespace, PageResult, PageStore
from tests.client.conftest import ServedCluster, served_cluster

NAMESPACE = PageNamespace(b"a model", "test pages of any size, v1", rank=1, world_size=2)
# The machine that runs the tests may be busy: nothing times out that is not meant to.
PATIENT: dict[str, Any] = {"lookup_timeout_s": 20.0, "failover_s": 5.0, "stall_timeout_s": 20.0}


def keys(count: int, first: int = 0) -> list[bytes]:
    return [b"page %d" % number for number in range(first, first + count)]


def page(number: int, size_bytes: int) -> bytes:
    """The same arguments give the same bytes."""
    return np.random.default_rng(number).integers(0, 256, size_bytes, np.uint8).tobytes()


def pages(sizes: Sequence[int]) -> list[bytes]:
    return [page(number, size_bytes) for number, size_bytes in enumerate(sizes)]


def empty(sizes: Sequence[int]) -> list[bytearray]:
    return [bytearray(size_bytes) for size_bytes in sizes]


class Pages:
    """A cluster, and page stores that are closed with it."""

    def __init__(self, cluster: ServedCluster, opened: ExitStack) -> None:
        self.cluster = cluster
        self._opened = opened
        self.last_client: KVStoreClient

    def store(
        self,
        namespace: PageNamespace = NAMESPACE,
        settings: dict[str, Any] | None = None,
        **options: object,
    ) -> PageStore:
        client = self._opened.enter_context(connect(self.cluster.address, **(PATIENT | (settings or {}))))
        self.last_client = client
        return client.pages(namespace, **options)

    def is_on(self, node: int, key: bytes) -> bool:
        """Whether that node has the page."""
        (chunk_id,) = NAMESPACE.chunk_ids([key])
        return chunk_id in {variant.chunk_id for variant in self.cluster.nodes[node].list()[0]}

    def counted(self, name: str) -> int:
        return self.last_client.metrics.snapshot().get(name, 0)


@pytest.fixture(params=["grpc", "bulk"])
def single(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Pages]:
    """Two nodes; each page is on one of them."""
    with served_cluster(tmp_path, nodes=2, bulk=request.param == "bulk") as cluster, ExitStack() as opened:
        yield Pages(cluster, opened)


@pytest.fixture(params=["grpc", "bulk"])
def replicated(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Pages]:
    """Two nodes; each page is on both."""
    with (
        served_cluster(tmp_path, nodes=2, replicas=2, bulk=request.param == "bulk") as cluster,
        ExitStack() as opened,
    ):
        yield Pages(cluster, opened)


@pytest.fixture
def roomy(tmp_path: Path) -> Iterator[Pages]:
    """Two nodes with room for 8,192 pages each: a node's memory comes in pieces of 64 KiB."""
    with (
        served_cluster(tmp_path, nodes=2, memory_bytes=512 << 20, bulk=True) as cluster,
        ExitStack() as opened,
    ):
        yield Pages(cluster, opened)


@dataclass(frozen=True)
class SlowPages:
    """A store whose one node sends and takes 2 Mbit/s, and has a page of 4 MB: `keys(1)`."""

    client: KVStoreClient
    store: PageStore
    endpoint: str
    """Of the node."""


@pytest.fixture(params=["grpc", "bulk"])
def slow_node(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[SlowPages]:
    with (
        served_cluster(tmp_path, bulk=request.param == "bulk") as cluster,
        ExitStack() as opened,
    ):
        addresses = [*(s.address for s in cluster.servers), *(b.address for b in cluster.bulk)]
        links = [opened.enter_context(ShapedLink(address, bandwidth_bps=10e9)) for address in addresses]
        routes = {address: link.address for address, link in zip(addresses, links, strict=True)}
        client = opened.enter_context(connect(cluster.address, routes=routes, close_timeout_s=0.1, **PATIENT))
        store = client.pages(NAMESPACE)
        assert store.put(keys(1), [page(0, 4_000_000)]).ok == (True,)
        assert store.exists(keys(1)) == 1
        links[-1].set_bandwidth(2e6)
        yield SlowPages(client, store, cluster.servers[0].address)


@pytest.fixture
def slow(slow_node: SlowPages) -> PageStore:
    """A store whose one node sends 2 Mbit/s, and a page of 4 MB on it."""
    return slow_node.store


def wait_for(store: PageStore, count: int) -> list[tuple[JobId, PageResult]]:
    """That many results, in the order in which jobs finished."""
    results: list[tuple[JobId, PageResult]] = []
    while len(results) < count:
        ready, _, _ = select.select([store.fileno()], [], [], 30)
        assert ready
        results += store.finished()
    return results
