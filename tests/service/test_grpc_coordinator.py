"""The Coordinator service and the metrics over it, with real storage servers that come and go."""

import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

from kvstore_api.placement import Member
from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_api.v1 import kvstore_pb2_grpc as rpc
from kvstore_cluster.arena import Arena
from kvstore_cluster.background import BackgroundLoop
from kvstore_cluster.calibrations import CalibrationRegistry
from kvstore_cluster.canaries import CanaryRegistry
from kvstore_cluster.catalogue import FileCatalogue
from kvstore_cluster.coordinator import Coordinator
from kvstore_cluster.node import StorageNode
from kvstore_cluster.repair import RepairWorker
from kvstore_codec.errors import AddressInUseError, ServiceError
from kvstore_service.cluster_stats import background_works, cluster_stats
from kvstore_service.grpc_coordinator import CoordinatorServer, serve_coordinator
from kvstore_service.grpc_server import GrpcServer
from kvstore_service.grpc_storage import serve_storage
from kvstore_service.listen import Address
from kvstore_service.metrics import ClusterCollector
from kvstore_service.metrics_server import metrics_endpoint
from kvstore_service.peer_nodes import GrpcPeers

ANY = Address("127.0.0.1", 0)


def storage(node_id: str) -> GrpcServer:
    node = StorageNode(node_id, Arena(1 << 20))
    repair = RepairWorker(node, GrpcPeers(node), bytes_per_s=1e6)
    return serve_storage(node, host="127.0.0.1", repair=repair)


@pytest.fixture
def catalogue(tmp_path: Path) -> Iterator[FileCatalogue]:
    catalogue = FileCatalogue(tmp_path)
    yield catalogue
    catalogue.close()


@pytest.fixture
def coordinator(catalogue: FileCatalogue) -> Coordinator:
    return Coordinator(catalogue)


@pytest.fixture
def calibrations(tmp_path: Path) -> CalibrationRegistry:
    return CalibrationRegistry(tmp_path / "calibrations")


@pytest.fixture
def canaries(tmp_path: Path) -> CanaryRegistry:
    return CanaryRegistry(tmp_path / "canaries")


@pytest.fixture
def server(
    coordinator: Coordinator, calibrations: CalibrationRegistry, canaries: CanaryRegistry
) -> Iterator[CoordinatorServer]:
    server = serve_coordinator(coordinator, calibrations, canaries, address=ANY)
    yield server
    server.stop(0)


@pytest.fixture
def node() -> Iterator[GrpcServer]:
    node = storage("node-0")
    yield node
    node.stop(0)


def wait_until(condition: Callable[[], bool], patience_s: float = 5.0) -> None:
    deadline = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def membership(server: CoordinatorServer) -> pb.MembershipReply:
    with grpc.insecure_channel(server.address) as channel:
        return rpc.CoordinatorStub(channel).Membership(pb.MembershipRequest())


def test_membership(server: CoordinatorServer, coordinator: Coordinator, node: GrpcServer) -> None:
    assert list(membership(server).members) == []
    coordinator.join(Member("node-0", node.address, 2.5), 1)
    reply = membership(server)
    assert reply.epoch == 1
    assert list(reply.members) == [pb.Member(node_id="node-0", endpoint=node.address, weight=2.5)]


def test_stats_come_from_every_node_that_answers(
    server: CoordinatorServer, coordinator: Coordinator, node: GrpcServer
) -> None:
    coordinator.join(Member("node-0", node.address), 1)
    coordinator.join(Member("node-1", "127.0.0.1:1"), 1)
    first, second = cluster_stats(server.address).nodes
    assert (first.alive, first.error, first.stats.bytes_limit) == (True, "", 1 << 20)
    assert second.error.startswith("UNAVAILABLE")
    assert not second.HasField("stats")


def test_a_node_that_stops_answering_leaves_the_membership_within_two_seconds(
    server: CoordinatorServer, coordinator: Coordinator, node: GrpcServer
) -> None:
    coordinator.join(Member("node-0", node.address), 1)
    node.stop(0)
    wait_until(lambda: not membership(server).members, patience_s=2.0)
    (status,) = cluster_stats(server.address).nodes
    assert not status.alive
    assert "UNAVAILABLE" in status.error


def test_another_node_at_the_same_address_is_not_taken_for_it(
    server: CoordinatorServer, coordinator: Coordinator, node: GrpcServer
) -> None:
    coordinator.join(Member("node-7", node.address), 1)
    wait_until(lambda: not membership(server).members)
    assert cluster_stats(server.address).nodes[0].error == f"{node.address} belongs to node-0 now"


def test_a_restarted_coordinator_knows_the_nodes_that_still_answer(
    coordinator: Coordinator,
    calibrations: CalibrationRegistry,
    canaries: CanaryRegistry,
    catalogue: FileCatalogue,
    node: GrpcServer,
) -> None:
    coordinator.join(Member("node-0", node.address), 1)
    coordinator.join(Member("node-1", "127.0.0.1:1"), 1)
    server = serve_coordinator(Coordinator(catalogue), calibrations, canaries, address=ANY)
    reply = membership(server)
    assert [member.node_id for member in reply.members] == ["node-0"]
    assert reply.epoch == 3
    server.stop(0)


def test_health(server: CoordinatorServer) -> None:
    with grpc.insecure_channel(server.address) as channel:
        for service in ("", "kvstore.v1.Coordinator"):
            reply = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service))
            assert reply.status == health_pb2.HealthCheckResponse.SERVING


def test_background_loops_that_fail_show_in_health_and_stats(
    server: CoordinatorServer, node: GrpcServer
) -> None:
    def fail() -> None:
        raise TypeError("a mistake")

    assert background_works(server.address)
    loop = BackgroundLoop("kvstore-test", fail, longest_pause_s=1e6)
    loop.start()
    wait_until(lambda: not background_works(server.address))
    with grpc.insecure_channel(node.address) as channel:
        stats = rpc.StorageStub(channel).Stats(pb.StatsRequest())
    assert _serving(server.address, "")  # requests are served all the same
    loop.stop()
    assert stats.gauges["background_failing"] >= 1
    assert stats.counters["background_errors"] >= 1
    assert background_works(server.address)


def _serving(address: str, service: str) -> bool:
    with grpc.insecure_channel(address) as channel:
        reply = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service))
    return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)


def test_nobody_there_is_one_clear_error() -> None:
    with pytest.raises(ServiceError, match=r"no cluster answers at 127.0.0.1:1; .*kvstore serve"):
        cluster_stats("127.0.0.1:1")


def scrape(port: int) -> dict[tuple[str, str], float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as response:
        text = response.read().decode()
    return {
        (sample.name, sample.labels.get("node_id", "")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_metrics(
    coordinator: Coordinator,
    calibrations: CalibrationRegistry,
    canaries: CanaryRegistry,
    node: GrpcServer,
    unused_port: int,
) -> None:
    server = serve_coordinator(coordinator, calibrations, canaries, address=ANY)
    coordinator.join(Member("node-0", node.address), 1)
    coordinator.join(Member("node-1", "127.0.0.1:1"), 1)
    with metrics_endpoint(Address("127.0.0.1", unused_port)) as registry:
        assert scrape(unused_port) == {}
        registry.register(ClusterCollector(lambda: cluster_stats(server.address)))
        samples = scrape(unused_port)
        assert samples["kvstore_coordinator_up", ""] == 1
        assert samples["kvstore_cluster_epoch", ""] >= 2
        assert samples["kvstore_node_up", "node-0"] == 1
        assert samples["kvstore_node_up", "node-1"] == 0
        assert samples["kvstore_node_bytes_limit", "node-0"] == 1 << 20
        assert samples["kvstore_node_hits_total", "node-0"] == 0
        assert samples["kvstore_node_pinned", "node-0"] == 0
        assert samples["kvstore_node_disk_bytes_limit", "node-0"] == 0
        assert samples["kvstore_node_disk_ok", "node-0"] == 1
        assert samples["kvstore_node_repair_sent_total", "node-0"] == 0
        assert samples["kvstore_node_drain_left", "node-0"] == 0
        assert ("kvstore_node_bytes_limit", "node-1") not in samples
        server.stop(0)
        assert {name: value for (name, _), value in scrape(unused_port).items() if "gateway" not in name} == {
            "kvstore_build_info": 1,
            "kvstore_coordinator_up": 0,
        }
        with pytest.raises(AddressInUseError), metrics_endpoint(Address("127.0.0.1", unused_port)):
            pass
