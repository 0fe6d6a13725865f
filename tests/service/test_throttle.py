"""`kvstore throttle` against real servers: what both ports of a node send, together."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from typer.testing import CliRunner

from kvstore_api.frames import HEADER_BYTES, PREFACE, FrameKind, pack_header, unpack_header
from kvstore_api.placement import Member
from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_api.v1 import kvstore_pb2_grpc as rpc
from kvstore_cluster.arena import Arena
from kvstore_cluster.calibrations import CalibrationRegistry
from kvstore_cluster.canaries import CanaryRegistry
from kvstore_cluster.catalogue import FileCatalogue
from kvstore_cluster.coordinator import Coordinator
from kvstore_cluster.repair import RepairWorker
from kvstore_cluster.slow_disk import SlowNode, SlowStore
from kvstore_codec.errors import ConfigurationError, KVStoreError, ServiceError
from kvstore_service.bandwidth import MIN_PIECE_BYTES
from kvstore_service.cli.app import app
from kvstore_service.embedded import EmbeddedCluster
from kvstore_service.grpc_coordinator import serve_coordinator
from kvstore_service.listen import Address
from kvstore_service.peer_nodes import GrpcPeers
from kvstore_service.settings import settings_of
from kvstore_service.storage_server import StorageServer
from kvstore_service.throttle import Throttle
from tests.sample_chunk import sample_chunk

CHUNK = sample_chunk(frame_bytes=24_000)
REQUEST = pb.ReadRequest(
    chunks=[pb.ChunkRef(content_id=CHUNK.chunk_id.content_id, prefix_id=CHUNK.chunk_id.prefix_id)],
    encodings=[CHUNK.encoding],
    ranges=[pb.ReadRange()],
)
BURST_BYTES = 16 << 10


@dataclass
class Cluster:
    address: str
    servers: dict[str, StorageServer]

    def kvstore(self, *arguments: str) -> Any:
        result = CliRunner().invoke(app, [*arguments, "--address", self.address, "--json"])
        if isinstance(result.exception, KVStoreError):
            raise result.exception
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    def text(self, *arguments: str) -> str:
        return CliRunner().invoke(app, [*arguments, "--address", self.address], env={"COLUMNS": "200"}).output


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """Two nodes with disks and both ports, and the chunk on each of them."""
    catalogue = FileCatalogue(tmp_path)
    coordinator = Coordinator(catalogue)
    registry = CalibrationRegistry(tmp_path / "calibrations")
    canaries = CanaryRegistry(tmp_path / "canaries")
    front = serve_coordinator(coordinator, registry, canaries, address=Address("127.0.0.1", 0))
    nodes, servers = [], {}
    for number in range(2):
        store = SlowStore(tmp_path / f"disk-{number}", 64 << 20)
        node = SlowNode(f"node-{number}", Arena(4 << 20, 4 << 10), store=store)
        put = node.begin_put(CHUNK.chunk_id, CHUNK.encoding, len(CHUNK.data))
        assert put is not None
        put.write(CHUNK.data)
        assert put.commit()
        worker = RepairWorker(node, GrpcPeers(node), bytes_per_s=1e9)
        worker.start()
        server = StorageServer(node, worker, host="127.0.0.1")
        coordinator.join(Member(node.node_id, server.address, bulk_endpoint=server.bulk_address), number + 1)
        nodes.append((node, worker))
        servers[node.node_id] = server
    yield Cluster(front.address, servers)
    for server in servers.values():
        server.stop(0)
    for node, worker in nodes:
        worker.stop()
        node.check_integrity()
        node.close()
    front.stop(0)
    coordinator.close()
    catalogue.close()


def read_grpc(server: StorageServer) -> bytes:
    with grpc.insecure_channel(server.address) as channel:
        return b"".join(reply.data for reply in rpc.StorageStub(channel).Read(REQUEST))


def read_bulk(server: StorageServer) -> bytes:
    host, _, port = server.bulk_address.rpartition(":")
    with socket.create_connection((host, int(port)), 10) as connected, connected.makefile("rb") as stream:
        message = REQUEST.SerializeToString()
        connected.sendall(PREFACE + pack_header(FrameKind.READ, len(message)) + message)
        return stream.read(unpack_header(bytearray(stream.read(HEADER_BYTES))).length)


def read_frames(server: StorageServer) -> bytes:
    """The same chunk through the port that sends ranges in any order."""
    host, _, port = server.bulk_address.rpartition(":")
    with socket.create_connection((host, int(port)), 10) as connected, connected.makefile("rb") as stream:
        request = pb.ReadRequest(any_order=True)
        request.MergeFrom(REQUEST)
        message = request.SerializeToString()
        connected.sendall(PREFACE + pack_header(FrameKind.READ, len(message)) + message)
        header = unpack_header(bytearray(stream.read(HEADER_BYTES)))
        assert header.kind == FrameKind.FRAMES
        return stream.read(header.length)


READERS: list[Callable[[StorageServer], bytes]] = [read_bulk, read_grpc, read_frames]


def seconds(read: Callable[[], object]) -> float:
    began_s = time.monotonic()
    read()
    return time.monotonic() - began_s


@pytest.mark.parametrize("read", READERS)
def test_a_limit_holds_and_is_taken_away(cluster: Cluster, read: Callable[[StorageServer], bytes]) -> None:
    server = cluster.servers["node-0"]
    cluster.kvstore("throttle", "8mbit")
    least_s = (len(CHUNK.data) - BURST_BYTES) / 1e6
    assert least_s > 0.2
    assert seconds(lambda: read(server)) >= least_s
    assert read(server) == CHUNK.data
    cluster.kvstore("throttle", "100kbit")
    cluster.kvstore("throttle", "off")
    assert seconds(lambda: read(server)) < 40 * least_s  # half of what it takes under this limit
    assert read(server) == CHUNK.data


def test_all_connections_of_a_node_share_it(cluster: Cluster) -> None:
    server = cluster.servers["node-0"]
    cluster.kvstore("throttle", "16mbit")
    readers = [threading.Thread(target=read, args=(server,)) for read in READERS]
    began_s = time.monotonic()
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert time.monotonic() - began_s >= (2 * len(CHUNK.data) - BURST_BYTES) / 2e6


def test_one_node_alone_and_what_is_shown(cluster: Cluster) -> None:
    assert "limit" not in cluster.text("status")
    shown = cluster.kvstore("throttle", "50mbit", "--node", "node-1")
    expected = [
        {"node_id": "node-0", "bandwidth_bps": None, "disk_read_Bps": None},
        {"node_id": "node-1", "bandwidth_bps": 50e6, "disk_read_Bps": None},
    ]
    assert shown["nodes"] == expected
    assert cluster.kvstore("throttle")["nodes"] == expected
    assert "50mbit" in cluster.text("status")
    assert "50mbit" in cluster.text("throttle")
    assert [node["gauges"].get("throttle_bps") for node in cluster.kvstore("status")["nodes"]] == [None, 50e6]


@pytest.mark.parametrize("read", READERS)
def test_a_slow_disk_is_read_every_time(cluster: Cluster, read: Callable[[StorageServer], bytes]) -> None:
    server = cluster.servers["node-0"]
    cluster.kvstore("throttle", "--disk", "2MB/s", "--node", "node-0")
    least_s = len(CHUNK.data) / 2e6
    for _ in range(2):
        assert seconds(lambda: read(server)) >= least_s > 0.1
    assert seconds(lambda: read(cluster.servers["node-1"])) < least_s
    cluster.kvstore("throttle", "off")
    assert seconds(lambda: read(server)) < least_s
    assert read(server) == CHUNK.data


def test_each_limit_leaves_the_other_alone(cluster: Cluster) -> None:
    cluster.kvstore("throttle", "50mbit", "--node", "node-0")
    shown = cluster.kvstore("throttle", "--disk", "160MB/s", "--node", "node-0")
    both = {"node_id": "node-0", "bandwidth_bps": 50e6, "disk_read_Bps": 160e6}
    neither = {"node_id": "node-1", "bandwidth_bps": None, "disk_read_Bps": None}
    assert shown["nodes"] == [both, neither]
    assert "50mbit, disk 160 MB/s" in cluster.text("status")
    assert "160.0 MB/s" in cluster.text("throttle")
    assert cluster.kvstore("throttle", "20mbit", "--node", "node-0")["nodes"][0]["disk_read_Bps"] == 160e6
    assert cluster.kvstore("throttle", "--disk", "off")["nodes"][0] == both | {
        "bandwidth_bps": 20e6,
        "disk_read_Bps": None,
    }
    cluster.kvstore("throttle", "--disk", "160MB/s")
    assert cluster.kvstore("throttle", "off")["nodes"] == [neither | {"node_id": "node-0"}, neither]


def test_a_client_of_before_takes_its_limit_away(cluster: Cluster) -> None:
    cluster.kvstore("throttle", "50mbit")
    with grpc.insecure_channel(cluster.servers["node-0"].address) as channel:
        rpc.StorageStub(channel).Throttle(pb.ThrottleRequest())  # a limit of 0, as it was written then
    assert [node["bandwidth_bps"] for node in cluster.kvstore("throttle")["nodes"]] == [None, 50e6]


def test_what_makes_no_sense_is_refused(cluster: Cluster) -> None:
    for arguments, reason in (
        (("throttle", "fast"), "is not a bandwidth"),
        (("throttle", "1kbit"), "100 kbit/s or more"),
        (("throttle", "30000000000gbit"), "up to 1000 Gbit/s"),
        (("throttle", "1mbit", "--node", "node-7"), "no live node"),
        (("throttle", "--node", "node-1"), "needs a bandwidth"),
        (("throttle", "--disk", "fast"), "is not a disk rate"),
        (("throttle", "--disk", "1"), "'1' has no unit; write for example 160MB/s"),
        (("throttle", "--disk", "1kB/s"), "1 MB/s or more"),
    ):
        with pytest.raises(KVStoreError, match=reason):
            cluster.kvstore(*arguments)
    assert all(
        node["bandwidth_bps"] is node["disk_read_Bps"] is None
        for node in cluster.kvstore("throttle")["nodes"]
    )


def test_a_wrong_limit_is_refused_before_the_cluster_is_asked() -> None:
    nowhere = Cluster("127.0.0.1:1", {})
    for arguments in (("1kbit",), ("--disk", "1"), ("--disk", "1kB/s")):
        with pytest.raises(ConfigurationError):
            nowhere.kvstore("throttle", *arguments)
    with pytest.raises(
        ServiceError, match=r"no cluster answers .*; start one with `kvstore serve --experiments`"
    ):
        nowhere.kvstore("throttle", "50mbit")


@pytest.mark.slow
def test_a_node_that_was_not_started_for_experiments_says_how_to_start_one(tmp_path: Path) -> None:
    with EmbeddedCluster(settings_of(memory=4 << 20, disk=64 << 20, data_dir=tmp_path)) as running:
        cluster = Cluster(running.address, {})
        for arguments in (("50mbit",), ("--disk", "160MB/s"), ("off",)):
            with pytest.raises(KVStoreError) as refusal:
                cluster.kvstore("throttle", *arguments)
            assert "node-0 was not started for experiments" in str(refusal.value)
            assert "kvstore serve --experiments" in str(refusal.value)
        nothing = {"node_id": "node-0", "bandwidth_bps": None, "disk_read_Bps": None}
        assert cluster.kvstore("throttle")["nodes"] == [nothing]


@pytest.mark.slow
def test_a_cluster_that_was_started_for_experiments_takes_limits(tmp_path: Path) -> None:
    settings = settings_of(memory=4 << 20, disk=64 << 20, data_dir=tmp_path, experiments=True)
    with EmbeddedCluster(settings) as running:
        cluster = Cluster(running.address, {})
        cluster.kvstore("throttle", "50mbit")
        limits = {"node_id": "node-0", "bandwidth_bps": 50e6, "disk_read_Bps": 160e6}
        assert cluster.kvstore("throttle", "--disk", "160MB/s")["nodes"] == [limits]


def taken(throttle: Throttle, size_bytes: int) -> Iterator[int]:
    """Sizes of the pieces in which so many bytes may leave."""
    return (sum(view.nbytes for view in views) for views in throttle.paced([memoryview(bytes(size_bytes))]))


def test_whoever_waits_goes_on_when_the_limit_is_lifted() -> None:
    throttle = Throttle()
    assert list(taken(throttle, 1 << 20)) == [1 << 20]
    throttle.set(100e3)
    sizes: list[int] = []
    waiter = threading.Thread(target=lambda: sizes.extend(taken(throttle, 10_000_000)))
    waiter.start()
    time.sleep(0.05)
    assert waiter.is_alive()
    throttle.set(None)
    waiter.join(60)
    assert not waiter.is_alive()
    assert sum(sizes) == 10_000_000
    with pytest.raises(ConfigurationError):
        throttle.set(0.0)


def test_what_is_under_way_keeps_to_a_slower_limit() -> None:
    throttle = Throttle()
    throttle.set(1e9)
    pieces = taken(throttle, 1 << 20)
    assert next(pieces) == 250_000
    throttle.set(1e6)
    assert next(pieces) <= MIN_PIECE_BYTES  # not a second's worth of the new limit
