"""Reads of single frames from nodes that die, fall silent, are damaged or slow."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from kvstore_bench.shaping import ShapedLink
from kvstore_client import KVStoreClient, connect
from kvstore_client.fetch.base import ReadTask
from kvstore_client.frames import FrameResult
from kvstore_client.match import Match
from kvstore_client.miss_reason import MissReason
from kvstore_cluster.slow_disk import SlowNode
from tests.client.chunks import SPEC
from tests.client.conftest import ServedCluster, served_cluster
from tests.client.frames.frames import DOCUMENT, by_index, flip_a_stored_bit, put, stored_bytes, tasks_of

PATIENCE_S = 20.0
SLOTS = [0, 2]


class Replicated:
    """Three nodes, two of which hold each chunk; `links` lead to the bulk port of each."""

    def __init__(self, folder: Path, opened: ExitStack) -> None:
        self.cluster = opened.enter_context(served_cluster(folder, nodes=3, replicas=2, bulk=True))
        ports = [server.address for server in self.cluster.bulk]
        self.links = [opened.enter_context(ShapedLink(port, bandwidth_bps=10e9)) for port in ports]
        routes = {port: link.address for port, link in zip(ports, self.links, strict=True)}
        self.client = opened.enter_context(
            connect(
                self.cluster.address,
                routes=routes,
                lookup_timeout_s=20.0,
                failover_s=0.5,
                stall_timeout_s=PATIENCE_S,
                fetch_timeout_s=60.0,
            )
        )
        put(self.client)
        self.match = self.client.match(SPEC, DOCUMENT)
        self.tasks = tasks_of(self.match, 0, SLOTS)

    def index_of(self, task: ReadTask) -> int:
        return int(task.chunk.member.node_id.removeprefix("node-"))

    def read(self) -> list[FrameResult]:
        return by_index(list(self.client.read_frames(self.tasks)))

    def counted(self, name: str) -> int:
        return self.client.metrics.snapshot().get(name, 0)


@pytest.fixture
def replicated(tmp_path: Path) -> Iterator[Replicated]:
    with ExitStack() as opened:
        yield Replicated(tmp_path, opened)


def require_all(results: Sequence[FrameResult]) -> None:
    assert [result.missing for result in results] == [None] * len(results)
    assert all(result.data == stored_bytes(result.task) for result in results)


def test_frames_of_a_dead_node_come_from_the_other_owner(replicated: Replicated) -> None:
    replicated.cluster.stop_node(replicated.index_of(replicated.tasks[0]))
    require_all(replicated.read())
    assert replicated.counted("failover_unreachable") >= len(SLOTS)


def test_damaged_frames_come_from_the_other_owner(replicated: Replicated) -> None:
    flip_a_stored_bit(replicated.cluster, replicated.tasks[3])
    require_all(replicated.read())
    assert replicated.counted("failover_checksum") == 1


def test_chunks_that_are_gone_come_from_the_other_owner(replicated: Replicated) -> None:
    task = replicated.tasks[2]
    replicated.cluster.nodes[replicated.index_of(task)].delete([task.chunk.chunk_id])
    require_all(replicated.read())
    assert replicated.counted("failover_gone") == len(SLOTS)


def test_frames_of_a_silent_node_come_from_the_other_owner(replicated: Replicated) -> None:
    require_all(replicated.read())  # there are connections
    replicated.links[replicated.index_of(replicated.tasks[0])].cut()
    began_s = time.monotonic()
    require_all(replicated.read())
    assert time.monotonic() - began_s < PATIENCE_S / 2
    assert replicated.counted("failover_silent") >= len(SLOTS)


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[tuple[ServedCluster, KVStoreClient, Match]]:
    """One node, whose disk reads one frame of the document in 65 ms."""
    with served_cluster(tmp_path, bulk=True, disk_bytes=64 << 20, experiments=True) as cluster:
        node = cluster.nodes[0]
        assert isinstance(node, SlowNode)
        with connect(cluster.address, stall_timeout_s=PATIENCE_S) as client:
            put(client)
            while node.maintain():
                pass
            node.limit_disk(1e6)
            assert node.stats().gauges["memory_chunks"] == 0
            yield cluster, client, client.match(SPEC, DOCUMENT)
            node.limit_disk(None)


def test_a_read_ends_at_its_deadline_with_what_has_come(
    slow: tuple[ServedCluster, KVStoreClient, Match],
) -> None:
    _, client, match = slow
    tasks = tasks_of(match, 0, range(4)) + tasks_of(match, 1, range(4))
    began_s = time.monotonic()
    results = by_index(list(client.read_frames(tasks, timeout_s=0.6)))
    assert time.monotonic() - began_s < PATIENCE_S / 2
    assert len(results) == len(tasks)
    assert {result.missing for result in results} == {None, MissReason.TIMEOUT}
    assert all(result.data == stored_bytes(result.task) for result in results if result.data is not None)


def test_what_is_cancelled_is_not_read_from_disk(slow: tuple[ServedCluster, KVStoreClient, Match]) -> None:
    cluster, client, match = slow
    tasks = [task for period in (0, 1) for slot in range(4) for task in tasks_of(match, period, [slot])]
    read = client.read_frames(tasks)
    first = read.take()
    assert first
    read.cancel()
    rest = list(read)
    assert len(first) + len(rest) == len(tasks)
    wait_until(lambda: not any(thread.name == "kvstore-frames" for thread in threading.enumerate()))
    counters = cluster.nodes[0].stats().counters
    assert counters["frame_disk_reads"] < len(tasks)
    assert counters["ranges_dropped"] > 0
    assert len(cluster.bulk[0]._connections) == 1  # the connection was not given up


def test_a_cancelled_part_makes_room_for_the_rest(slow: tuple[ServedCluster, KVStoreClient, Match]) -> None:
    _, client, match = slow
    tasks = tasks_of(match, 0, range(4)) + tasks_of(match, 1, range(4))
    read = client.read_frames(tasks)
    read.cancel([1, 3])
    results = by_index(list(read))
    assert [result.missing for result in results] == [
        MissReason.CANCELLED if index in (1, 3) else None for index in range(len(tasks))
    ]


def test_closing_the_client_ends_its_reads(slow: tuple[ServedCluster, KVStoreClient, Match]) -> None:
    _, client, match = slow
    read = client.read_frames(tasks_of(match, 0, range(4)) + tasks_of(match, 1, range(4)))
    assert read.take()
    client.close()
    assert {result.missing for result in read} <= {MissReason.CLOSED, None}
    after = client.read_frames(tasks_of(match, 0, [0]))
    assert {result.missing for result in after} == {MissReason.CLOSED}


def test_without_a_thread_every_range_is_missing(
    slow: tuple[ServedCluster, KVStoreClient, Match], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, client, match = slow

    def refuse(self: threading.Thread) -> None:
        raise RuntimeError(f"can't start new thread {self.name}")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    results = list(client.read_frames(tasks_of(match, 0, [0])))
    assert {result.missing for result in results} == {MissReason.NO_RESOURCES}


def wait_until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
