"""Reads of single frames from real nodes: whatever is delivered is right, and what is missing has a reason."""

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_client import KVStoreClient, connect
from kvstore_client.match import Match
from kvstore_client.miss_reason import MissReason
from kvstore_service.grpc_storage import StorageService
from tests.client.chunks import SPEC
from tests.client.conftest import ServedCluster, served_cluster
from tests.client.frames.frames import (
    CHUNKS,
    DOCUMENT,
    by_index,
    flip_a_stored_bit,
    put,
    stored_bytes,
    tasks_of,
)


@pytest.fixture(params=[True, False], ids=["bulk port", "grpc"])
def cluster(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServedCluster]:
    with served_cluster(tmp_path_factory.mktemp("cluster"), nodes=2, bulk=request.param) as served:
        yield served


@pytest.fixture
def client(cluster: ServedCluster) -> Iterator[KVStoreClient]:
    with connect(cluster.address) as client:
        put(client)
        yield client


@pytest.fixture
def match(client: KVStoreClient) -> Iterator[Match]:
    match = client.match(SPEC, DOCUMENT)
    assert len(match.chunks) == CHUNKS
    yield match
    client.release(match)


@pytest.mark.parametrize("in_place", [True, False], ids=["buffers", "own memory"])
def test_single_frames_of_all_chunks_come_whole(client: KVStoreClient, match: Match, in_place: bool) -> None:
    tasks = tasks_of(match, 1, [0, 2, 3])
    assert [task.frame_count for task in tasks] == [1, 2] * CHUNKS
    buffers = [memoryview(bytearray(task.size_bytes)) for task in tasks] if in_place else None
    read = client.read_frames(tasks, buffers=buffers)
    results = by_index(list(read))
    assert [result.index for result in results] == list(range(len(tasks)))
    assert read.is_complete
    assert not read.take()
    for result in results:
        assert result.missing is None
        assert result.task is tasks[result.index]
        assert result.data == stored_bytes(result.task)
        if buffers is not None:
            assert buffers[result.index] == result.data


def test_nothing_to_read_is_complete_at_once(client: KVStoreClient) -> None:
    read = client.read_frames([])
    assert read.is_complete
    assert not list(read)


def test_a_chunk_that_is_gone_costs_its_own_ranges(
    cluster: ServedCluster, client: KVStoreClient, match: Match
) -> None:
    for node in cluster.nodes:
        node.delete([DOCUMENT[1]])
    results = by_index(list(client.read_frames(tasks_of(match, 0, [0, 2]))))
    assert [result.missing for result in results] == [None, None, *[MissReason.GONE] * 2, *[None] * 4]
    assert [result.data is None for result in results] == [result.missing is not None for result in results]


def test_damage_costs_the_range_that_has_it(
    cluster: ServedCluster, client: KVStoreClient, match: Match
) -> None:
    tasks = tasks_of(match, 0, [0, 2])
    flip_a_stored_bit(cluster, tasks[3])
    results = by_index(list(client.read_frames(tasks)))
    assert [result.missing for result in results] == [*[None] * 3, MissReason.CHECKSUM, *[None] * 4]


def test_what_is_cancelled_is_missing_and_the_rest_comes(client: KVStoreClient, match: Match) -> None:
    tasks = tasks_of(match, 0, [0, 2])
    read = client.read_frames(tasks)
    read.cancel([1, 5])
    results = by_index(list(read))
    assert [result.index for result in results] == list(range(len(tasks)))
    assert {result.missing for result in results} <= {None, MissReason.CANCELLED}
    assert {result.index for result in results if result.missing} <= {1, 5}
    again = client.read_frames(tasks)
    assert all(result.missing is None for result in again)


def test_a_dead_node_is_named_as_the_reason(
    cluster: ServedCluster, client: KVStoreClient, match: Match
) -> None:
    cluster.stop_node(0)
    results = list(client.read_frames(tasks_of(match, 0, [1]), timeout_s=5))
    for result in results:
        on_dead_node = result.task.chunk.member.node_id == cluster.nodes[0].node_id
        assert result.missing == (MissReason.UNREACHABLE if on_dead_node else None)
    assert {result.missing for result in results} == {None, MissReason.UNREACHABLE}


def test_a_range_that_fails_in_its_middle_costs_no_other_range(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As nodes do that send each range in order while they read it."""
    read, broken = StorageService.read, 1

    def breaks_off(
        self: StorageService, request: pb.ReadRequest, context: grpc.ServicerContext
    ) -> Iterator[bytes]:
        request.any_order, request.piece_bytes = False, 1000
        begun = False
        for message in read(self, request, context):
            if pb.ReadReply.FromString(message).range != broken:
                yield message
            elif not begun:
                begun = True
                yield message
                yield pb.ReadReply(range=broken, status=pb.READ_STATUS_NOT_FOUND).SerializeToString()

    monkeypatch.setattr(StorageService, "read", breaks_off)
    with served_cluster(tmp_path) as cluster, connect(cluster.address) as client:
        put(client)
        match = client.match(SPEC, DOCUMENT)
        tasks = tasks_of(match, 0, [0, 2])
        assert tasks[broken].size_bytes > 1000
        results = by_index(list(client.read_frames(tasks)))
        assert [result.missing for result in results] == [None, MissReason.GONE, *[None] * 6]
        assert all(r.data == stored_bytes(r.task) for r in results if r.data is not None)
        client.release(match)
