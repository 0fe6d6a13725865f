"""A fetch for an engine that computes nothing meanwhile: leading chunks come one by one, until computing is faster."""

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from kvstore_bench.shaping import ShapedLink
from kvstore_client import KVStoreClient, connect
from kvstore_client.buffers import KVBuffers
from kvstore_client.fetch import Computing, FetchReport
from kvstore_client.fetch.base import ReadTask
from kvstore_client.fetch.fetch_state import FetchState
from kvstore_client.fetch.replanner import Replanner
from kvstore_client.metrics import ClientMetrics
from kvstore_client.miss_reason import MissReason
from kvstore_client.new_chunk import NewChunk
from kvstore_client.planning import CodecCost, Costs, LeadingPlanner, Links, PrefillCost, Profile, Race
from kvstore_client.timeline import Timeline
from tests.client.chunks import MEMBER, SPEC, ids, random_kv, stored_chunks
from tests.client.conftest import ServedCluster, served_cluster

CHUNKS = 8
CHUNK_BYTES = 393_216
END = CHUNKS * 256 + 20
FAST_BPS, SLOW_BPS = 100e6, 4e6
"""A chunk takes 31 ms, or .8 s."""
CHUNK_S = 0.2
"""What the engine takes to compute a chunk."""


@dataclass
class Setup:
    cluster: ServedCluster
    link: ShapedLink
    client: KVStoreClient
    costs: Costs

    def fetch(self, buffers: KVBuffers, *, first_chunk: int = 0) -> FetchReport:
        """Fetch the stored chunks from `first_chunk` on, as an engine does that asks from time to time."""
        match = self.client.match(SPEC, ids(CHUNKS))
        assert len(match.chunks) == CHUNKS
        chunks = match.chunks[first_chunk:]
        prefill = self.costs.snapshot().prefill
        race = Race([*(chunk.first_token for chunk in chunks), CHUNKS * 256], END, prefill)
        computing = Computing(self.costs, CHUNKS * 256, END - CHUNKS * 256, waits=True, race=race)
        part = type(match)(chunks, match.leases)
        fetch = self.client.fetch(part, buffers, None, computing=computing)
        deadline_s = time.monotonic() + 60
        while (report := fetch.finished()) is None:
            assert time.monotonic() < deadline_s
            time.sleep(0.002)
        return report

    def wait_for_the_node(self) -> None:
        """A node that failed is asked again after a pause."""
        deadline_s = time.monotonic() + 60
        while self.client._view.is_paused(self.cluster.servers[0].address):
            assert time.monotonic() < deadline_s
            time.sleep(0.01)

    def counted(self, name: str) -> int:
        return self.client.metrics.snapshot().get(name, 0)


@pytest.fixture
def setup(tmp_path: Path) -> Iterator[Setup]:
    with served_cluster(tmp_path, bulk=True) as cluster, ExitStack() as opened:
        with connect(cluster.address, encoding="exact-raw", cache_dir=tmp_path) as writer:
            chunks = [NewChunk(name, lambda i=i: random_kv(i)) for i, name in enumerate(ids(CHUNKS))]  # type: ignore[misc]
            assert writer.store.put(SPEC, chunks).result(60) == CHUNKS
        link = opened.enter_context(ShapedLink(cluster.bulk[0].address, bandwidth_bps=FAST_BPS))
        settings = {
            "routes": {cluster.bulk[0].address: link.address},
            "cache_dir": tmp_path,
            "stall_timeout_s": 60.0,
            "fetch_policy": "adaptive",
        }
        client = opened.enter_context(connect(cluster.address, encoding="exact-raw", **settings))
        profile = Profile({}, PrefillCost(0.0, CHUNK_S / 256, 0.0), 1.0, 1, unmeasured=CodecCost(1e-6, 0.0))
        yield Setup(cluster, link, client, Costs(profile))
        cluster.check_nothing_is_held()


@pytest.fixture
def buffers(setup: Setup) -> KVBuffers:
    return setup.client.buffers.acquire(SPEC, CHUNKS * 256)


def check(buffers: KVBuffers, first: int, end: int) -> None:
    for index in range(first, end):
        keys, values = random_kv(index)
        tokens = slice(index * 256, index * 256 + 256)
        assert torch.equal(buffers.keys[:, :, tokens], keys)
        assert torch.equal(buffers.values[:, :, tokens], values)


def test_a_fast_link_brings_everything(setup: Setup, buffers: KVBuffers) -> None:
    report = setup.fetch(buffers)
    assert (report.delivered, report.missing) == (CHUNKS, {})
    check(buffers, 0, CHUNKS)
    assert setup.counted("fetches_predicted") == setup.counted("fetches") == 1


def test_a_match_may_begin_behind_what_the_engine_has(setup: Setup, buffers: KVBuffers) -> None:
    report = setup.fetch(buffers, first_chunk=3)
    assert (report.chunks, report.delivered) == (CHUNKS - 3, CHUNKS - 3)
    check(buffers, 3, CHUNKS)


def test_a_link_that_is_known_to_be_slow_is_not_asked(setup: Setup, buffers: KVBuffers) -> None:
    setup.link.set_bandwidth(SLOW_BPS)
    while not setup.client.links.snapshot():  # as long as nothing has come, nothing is known
        assert setup.fetch(buffers).delivered < CHUNKS
        setup.wait_for_the_node()
    before = setup.link.from_target_bytes
    report = setup.fetch(buffers)
    assert (report.delivered, report.missing, report.received_bytes) == (0, {}, 0)
    assert setup.link.from_target_bytes - before < CHUNK_BYTES


def test_a_first_fetch_over_a_slow_link_ends_soon(setup: Setup, buffers: KVBuffers) -> None:
    """Nothing was known of the link. Waiting for all chunks would take 6.3 s, computing them takes 1.6 s."""
    setup.link.set_bandwidth(SLOW_BPS)
    report = setup.fetch(buffers)
    assert report.delivered < CHUNKS // 2
    assert report.received_bytes < CHUNKS // 2 * CHUNK_BYTES
    assert setup.counted("miss_overtaken") + report.computed > 0


@pytest.mark.parametrize("how", ["cut", "slow"])
def test_chunks_that_arrived_before_the_link_broke_down_are_kept(
    setup: Setup, buffers: KVBuffers, how: str
) -> None:
    setup.fetch(buffers)
    buffers.keys.zero_()
    before = setup.link.from_target_bytes

    def break_down() -> None:
        while setup.link.from_target_bytes < before + 4 * CHUNK_BYTES:
            time.sleep(0.001)
        setup.link.cut() if how == "cut" else setup.link.set_bandwidth(SLOW_BPS / 10)

    breaking = threading.Thread(target=break_down)
    breaking.start()
    report = setup.fetch(buffers)
    breaking.join()
    setup.link.restore()
    assert 2 <= report.delivered < CHUNKS
    check(buffers, 0, report.delivered)
    assert set(report.missing.values()) <= {"overtaken"}
    assert len(report.missing) + report.computed == CHUNKS - report.delivered
    # The stall timeout is 60 s.
    assert setup.counted("miss_stalled") == 0


def test_a_node_that_sends_nothing_is_paused(setup: Setup, buffers: KVBuffers) -> None:
    """Otherwise every request would lose a tenth of its time to it."""
    setup.link.cut()
    assert setup.fetch(buffers).delivered == 0
    match = setup.client.match(SPEC, ids(CHUNKS))
    assert match.why_not is not None
    assert match.why_not.startswith("paused")
    setup.link.restore()


def test_nothing_is_read_behind_a_lost_chunk() -> None:
    links = Links()
    for _ in range(60):
        links.observe(MEMBER.endpoint, 5_000_000, 0.005)
    costs = Costs(Profile({}, PrefillCost(0.0, 1e-3, 0.0), 1.0, 1))
    replanner = Replanner(
        LeadingPlanner(),
        links,
        Computing(costs, CHUNKS * 256, 20, waits=True),
        Timeline(),
        ClientMetrics(),
        replan=True,
    )
    state = FetchState(
        stored_chunks(CHUNKS),
        layers=SPEC.layers,
        deadline_s=120,
        stall_s=60,
        timeline=Timeline(),
        replanner=replanner,
    )
    tasks: list[ReadTask] = []
    while not tasks or tasks[-1].chunk_index < 2:
        tasks += state.next_reads(MEMBER, 1.0)
    assert [task.chunk_index for task in tasks] == sorted(task.chunk_index for task in tasks)
    state.fail_chunks(tasks[-1:], MissReason.CHECKSUM)
    assert state.next_reads(MEMBER, 1.0) == []
    for task in tasks[:-1]:
        assert state.begin_decode(task)
        state.deliver(task)
    assert state.is_settled
    report = state.report()
    assert (report.delivered, report.missing) == (2, {2: "checksum"})
