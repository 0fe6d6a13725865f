"""The whole cluster with real Ray: it starts, survives the loss of any of its processes, and leaves no trace."""

import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import psutil
import pytest
import ray  # before a cluster starts, as a user's process may do

from kvstore_api.placement import Member, owners
from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_api.v1 import kvstore_pb2_grpc as rpc
from kvstore_codec.errors import AddressInUseError, CatalogueError, ConfigurationError, StartupError
from kvstore_service import embedded
from kvstore_service.cluster_stats import cluster_stats
from kvstore_service.embedded import EmbeddedCluster
from kvstore_service.settings import settings_of
from tests.processes import descendants
from tests.sample_chunk import SampleChunk, sample_chunk

MEMORY = 32 << 20


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedCluster]:
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))
        with EmbeddedCluster(settings_of(nodes=2, memory=MEMORY)) as cluster:
            yield cluster
    assert list(home.iterdir()) == []


def members(cluster: EmbeddedCluster) -> dict[str, Member]:
    with grpc.insecure_channel(cluster.address) as channel:
        reply = rpc.CoordinatorStub(channel).Membership(pb.MembershipRequest())
    return {member.node_id: Member(member.node_id, member.endpoint) for member in reply.members}


def ref(chunk: SampleChunk) -> pb.ChunkRef:
    return pb.ChunkRef(content_id=chunk.chunk_id.content_id, prefix_id=chunk.chunk_id.prefix_id)


def put(endpoint: str, chunk: SampleChunk) -> int:
    start = pb.PutStart(chunk=ref(chunk), encoding=chunk.encoding, size_bytes=len(chunk.data))
    steps = [pb.PutRequest(start=start), pb.PutRequest(data=chunk.data), pb.PutRequest(end=pb.PutEnd())]
    with grpc.insecure_channel(endpoint) as channel:
        (reply,) = rpc.StorageStub(channel).Put(iter(steps))
    return reply.status


def found(endpoint: str, chunk: SampleChunk) -> bool:
    with grpc.insecure_channel(endpoint) as channel:
        reply = rpc.StorageStub(channel).Lookup(
            pb.LookupRequest(chunks=[ref(chunk)], encodings=[chunk.encoding])
        )
    return bool(reply.answers[0].encoding)


def wait_until(condition: Callable[[], bool], patience_s: float) -> None:
    deadline = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_every_node_has_joined_with_its_memory(cluster: EmbeddedCluster) -> None:
    reply = cluster_stats(cluster.address)
    assert [node.member.node_id for node in reply.nodes] == ["node-0", "node-1"]
    assert all(node.alive and node.stats.bytes_limit == MEMORY for node in reply.nodes)
    assert len(set(cluster.storage_pids().values())) == 2


@pytest.mark.usefixtures("cluster")
def test_nodes_yield_to_no_other_process() -> None:
    actors = [*descendants("ray::StorageActor"), *descendants("ray::Coordinat")]
    assert len(actors) == 3
    assert {actor.nice() for actor in actors} == {os.getpriority(os.PRIO_PROCESS, 0)}


def test_a_killed_node_is_noticed_restarted_empty_and_its_chunks_can_be_stored_again(
    cluster: EmbeddedCluster, capfd: pytest.CaptureFixture[str]
) -> None:
    before = members(cluster)
    chunks = [sample_chunk(content=number) for number in range(8)]
    for chunk in chunks:
        (owner,) = owners(chunk.chunk_id.content_id, list(before.values()))
        assert put(owner.endpoint, chunk) == pb.PUT_STATUS_STORED
    pids = cluster.storage_pids()
    os.kill(pids["node-0"], signal.SIGKILL)
    wait_until(lambda: members(cluster).get("node-0") != before["node-0"], patience_s=2.5)
    wait_until(lambda: "node-0" in members(cluster), patience_s=60)
    after = members(cluster)
    assert after["node-1"] == before["node-1"]
    assert after["node-0"].endpoint != before["node-0"].endpoint
    assert cluster.storage_pids()["node-0"] != pids["node-0"]
    for chunk in chunks:
        # Same owners as before: node ids decide, not endpoints.
        (owner,) = owners(chunk.chunk_id.content_id, list(after.values()))
        kept = owner.node_id == "node-1"
        assert found(owner.endpoint, chunk) == kept
        assert put(owner.endpoint, chunk) == (pb.PUT_STATUS_ALREADY_STORED if kept else pb.PUT_STATUS_STORED)
    assert capfd.readouterr() == ("", "")


def test_a_killed_coordinator_comes_back_at_its_address_knowing_everybody(cluster: EmbeddedCluster) -> None:
    before, epoch = members(cluster), cluster_stats(cluster.address).epoch
    (coordinator,) = descendants("ray::Coordinat")
    coordinator.kill()

    def back() -> bool:
        try:
            return members(cluster) == before
        except grpc.RpcError:
            return False

    chunk = sample_chunk(content=99)
    (owner,) = owners(chunk.chunk_id.content_id, list(before.values()))
    assert put(owner.endpoint, chunk) == pb.PUT_STATUS_STORED  # reads and writes do not need it
    wait_until(lambda: not coordinator.is_running() or coordinator.status() == psutil.STATUS_ZOMBIE, 5)
    wait_until(back, patience_s=60)
    assert cluster_stats(cluster.address).epoch > epoch


def test_an_actor_that_does_not_answer_while_the_cluster_starts_is_named(
    cluster: EmbeddedCluster,
) -> None:
    never = ray.remote(num_cpus=1_000_000)(lambda: None).remote()
    with pytest.raises(
        StartupError, match=r"the coordinator did not answer within 0.1 s; .*overloaded; try again"
    ):
        embedded._answer(never, "the coordinator", 0.1)
    ray.cancel(never)


def test_ray_in_the_same_process_is_refused_by_name(cluster: EmbeddedCluster) -> None:
    with pytest.raises(StartupError, match="Ray already runs in this process"), EmbeddedCluster():
        pass


@pytest.mark.slow
def test_a_stopped_cluster_leaves_neither_processes_nor_files(
    tmp_path: Path, cluster: EmbeddedCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.stop()  # the last test of the module; stopping twice is harmless
    scratch = Path(tempfile.mkdtemp(prefix="kv"))
    monkeypatch.setenv("TMPDIR", str(scratch))
    children = {child.pid for child in psutil.Process().children(recursive=True)}
    data_dir = tmp_path / "data"
    again = EmbeddedCluster(settings_of(memory=MEMORY, data_dir=data_dir))
    again.start()
    again.stop()
    again.stop()
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= children
    assert list(scratch.iterdir()) == []
    assert sorted(entry.name for entry in data_dir.iterdir()) == [
        "calibrations",
        "canaries",
        "catalogue.json",
        "catalogue.lock",
    ]
    # The port, the folder and the process are free for the next one.
    with EmbeddedCluster(settings_of(memory=MEMORY, listen=again.address, data_dir=data_dir)) as successor:
        assert successor.address == again.address
        assert cluster_stats(successor.address).epoch > 1
    scratch.rmdir()


@pytest.mark.parametrize(
    ("arguments", "error", "complaint"),
    [
        ({"nodes": 0}, ConfigurationError, "at least one storage node"),
        ({"memory": 1 << 60}, ConfigurationError, "lower --memory"),
        ({"memory": 1}, ConfigurationError, "raise --memory"),
        ({"listen": "nowhere"}, ConfigurationError, "host:port"),
        ({"data_dir": Path("/proc/kvstore")}, CatalogueError, "cannot be written"),
    ],
)
def test_what_cannot_work_is_refused_before_ray_starts(
    monkeypatch: pytest.MonkeyPatch, arguments, error, complaint: str
) -> None:
    def started(*_: object, **__: object) -> None:
        pytest.fail("Ray was started")

    monkeypatch.setattr("ray.init", started)
    with pytest.raises(error, match=complaint), EmbeddedCluster(settings_of(**arguments)):
        pass


def test_a_taken_port_is_refused_before_ray_starts() -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(AddressInUseError), EmbeddedCluster(settings_of(listen=f"127.0.0.1:{port}")):
            pass
