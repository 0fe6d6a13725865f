"""Many fetches at once, and many that are cancelled: nothing stays behind."""

import ctypes
import gc
import os
import random
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import pytest
import torch

from kvstore_client import KVStoreClient, connect
from kvstore_client.fetch import Fetch
from kvstore_client.transport import connections
from tests.client.chunks import SPEC, ids, random_kv
from tests.client.conftest import ServedCluster, served_cluster
from tests.client.test_replicas import put

CHUNKS = 4
NODES = 2
DOCUMENT_BYTES = CHUNKS * 256 * SPEC.kv_bytes_per_token
PATIENT = {
    "lookup_timeout_s": 20.0,
    "failover_s": 20.0,
    "stall_timeout_s": 60.0,
    "fetch_timeout_s": 60.0,
    "retry_after_s": 0.0,
    "pool_bytes": 3 * DOCUMENT_BYTES,
}
IDLE_SOCKETS = 2 * (NODES * (connections._IDLE_CONNECTIONS + 1) + 1)
"""What an idle client may keep open: to each node its gRPC channel and idle connections to the bulk port, and the
coordinator's channel; both ends of each are in this process."""
SERVER_THREADS = ("kvstore-bulk", "kvstore-rpc", "kvstore-failure-detector")
T = TypeVar("T")


@dataclass
class Busy:
    """A client whose document is stored, and what to compare with when it is idle again."""

    cluster: ServedCluster
    client: KVStoreClient
    sockets_before: int
    """Before there was a client."""
    keys: torch.Tensor
    values: torch.Tensor
    threads: Counter[str] = field(default_factory=Counter)
    fetches: "weakref.WeakSet[Fetch]" = field(default_factory=weakref.WeakSet)

    def fetch(self, act: Callable[[Fetch], object]) -> None:
        """Start one, have `act` end it, and give everything back."""
        match = self.client.match(SPEC, ids(CHUNKS))
        assert len(match.chunks) == CHUNKS
        buffers = self.client.buffers.acquire(SPEC, match.tokens)
        fetch = self.client.fetch(match, buffers, None)
        self.fetches.add(fetch)
        try:
            act(fetch)
            if fetch.finish().complete:
                assert torch.equal(buffers.keys, self.keys)
                assert torch.equal(buffers.values, self.values)
        finally:
            fetch.finish()
            self.client.buffers.release(buffers)

    def check_nothing_is_left(self) -> None:
        self.cluster.check_nothing_is_held()
        assert eventually(lambda: client_threads() == self.threads), client_threads()
        assert eventually(lambda: sockets() <= self.sockets_before + IDLE_SOCKETS), sockets()
        gc.collect()
        assert not list(self.fetches)
        assert pooled_bytes(self.client) == self.client.settings.fetch.pool_bytes  # what it held, and no more
        self.client.close()
        assert eventually(lambda: sockets() == self.sockets_before), (sockets(), self.sockets_before)


@pytest.fixture(params=["grpc", "bulk"])
def busy(tmp_path: Path, request: pytest.FixtureRequest, one_thread: None) -> Iterator[Busy]:
    with served_cluster(tmp_path, nodes=NODES, bulk=request.param == "bulk") as cluster:
        with connect(
            cluster.address, **PATIENT
        ) as first:  # which has the process make what it keeps for ever
            assert put(first, ids(CHUNKS)) == CHUNKS
            match = first.match(SPEC, ids(CHUNKS))
            assert len({chunk.member for chunk in match.chunks}) == NODES
            first.release(match)
        before = settled(sockets)
        with connect(cluster.address, **PATIENT) as client:
            keys, values = zip(*map(random_kv, range(CHUNKS)), strict=True)
            busy = Busy(cluster, client, before, torch.cat(keys, dim=2), torch.cat(values, dim=2))
            taken = [client.buffers.acquire(SPEC, 256 * CHUNKS) for _ in range(3)]
            for buffers in taken:
                client.buffers.release(buffers)
            del taken, buffers
            busy.fetch(Fetch.wait)
            client._view.refresh()
            busy.threads = settled(client_threads)
            yield busy


@pytest.mark.timeout(200)
@pytest.mark.parametrize("count", [20, pytest.param(100, marks=pytest.mark.slow)])
def test_many_fetches_at_once(busy: Busy, count: int) -> None:
    together = threading.Barrier(count)

    def fetch() -> None:
        together.wait(60)
        busy.fetch(Fetch.wait)

    with ThreadPoolExecutor(count) as pool:
        for done in [pool.submit(fetch) for _ in range(count)]:
            done.result()
    counts = busy.client.metrics.snapshot()
    assert counts["chunks_delivered"] == (count + 1) * CHUNKS, counts
    busy.check_nothing_is_left()


@pytest.mark.timeout(200)
@pytest.mark.parametrize("count", [60, pytest.param(400, marks=pytest.mark.slow)])
def test_fetches_cancelled_at_random_points(busy: Busy, count: int) -> None:
    chance = random.Random(5)
    with ThreadPoolExecutor(4) as pool:
        longest_s = max(pool.map(lambda _: measured(lambda: busy.fetch(Fetch.wait)), range(16)))
    resident = 0

    def wait_until_cancelled(fetch: Fetch) -> None:
        """As an engine does: it waits for layers while somebody else ends the fetch."""
        canceller = threading.Timer(pauses.pop(), fetch.cancel)
        canceller.start()
        for layer in range(SPEC.layers):
            if not fetch.wait_layer(layer):
                break
        canceller.join()

    def cancel_after_a_while(fetch: Fetch) -> None:
        time.sleep(pauses.pop())
        fetch.cancel()

    for part in range(5):
        pauses = [chance.uniform(0, 1.2 * longest_s) for _ in range(count // 5)]
        ways = [chance.choice([wait_until_cancelled, cancel_after_a_while]) for _ in pauses]
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(busy.fetch, ways))
        if part == 0:
            resident = resident_bytes()
    counts = busy.client.metrics.snapshot()
    assert counts["miss_cancelled"] > count / 20, counts
    assert counts["chunks_cancelled"] >= counts["miss_cancelled"], counts
    assert not counts.get("chunks_missing"), counts
    assert counts["chunks_delivered"] > count / 20 * CHUNKS, counts
    assert resident_bytes() - resident < 16 * DOCUMENT_BYTES  # most of them came since
    busy.check_nothing_is_left()


def client_threads() -> Counter[str]:
    names = [thread.name for thread in threading.enumerate() if thread.name.startswith("kvstore-")]
    return Counter(name for name in names if not name.startswith(SERVER_THREADS))


def sockets() -> int:
    count = 0
    for entry in Path("/proc/self/fd").iterdir():
        try:
            count += str(entry.readlink()).startswith("socket:")
        except FileNotFoundError:  # closed since it was listed
            continue
    return count


def resident_bytes() -> int:
    """Without what the allocator keeps for later: it varies by tens of MiB."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def pooled_bytes(client: KVStoreClient) -> int:
    return sum(memory.numel() for memory in client.buffers._free)


def eventually(condition: Callable[[], bool], within_s: float = 30.0) -> bool:
    """What nobody waits for takes a moment."""
    deadline = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def settled(measure: Callable[[], T]) -> T:
    """When it has not changed for a while."""
    value = measure()
    while True:
        time.sleep(0.3)
        before, value = value, measure()
        if before == value:
            return value


def measured(action: Callable[[], object]) -> float:
    started = time.monotonic()
    action()
    return time.monotonic() - started
