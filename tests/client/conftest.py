"""A real cluster without Ray: storage nodes and a coordinator behind their real gRPC servers, in this process."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from kvstore_api.placement import Member
from kvstore_cluster.arena import Arena
from kvstore_cluster.calibrations import CalibrationRegistry
from kvstore_cluster.canaries import CanaryRegistry
from kvstore_cluster.canaries.registry import MAX_MODELS
from kvstore_cluster.catalogue import FileCatalogue
from kvstore_cluster.coordinator import Coordinator
from kvstore_cluster.disk.store import SegmentStore
from kvstore_cluster.node import StorageNode
from kvstore_cluster.slow_disk import SlowNode, SlowStore
from kvstore_service.bulk_server import BulkServer, serve_bulk
from kvstore_service.grpc_coordinator import CoordinatorServer, serve_coordinator
from kvstore_service.grpc_server import GrpcServer
from kvstore_service.grpc_storage import serve_storage
from kvstore_service.listen import Address


@dataclass
class ServedCluster:
    coordinator: CoordinatorServer
    books: Coordinator
    nodes: list[StorageNode]
    servers: list[GrpcServer]
    bulk: list[BulkServer]
    """The nodes' bulk ports, if they have any."""

    @property
    def address(self) -> str:
        return self.coordinator.address

    def stop_storage(self) -> None:
        for server in (*self.servers, *self.bulk):
            server.stop(0)
        self.servers.clear()
        self.bulk.clear()

    def stop_node(self, index: int) -> None:
        self.servers[index].stop(0)
        for port in self.bulk[index : index + 1]:
            port.stop(0)

    def stored_chunks(self) -> int:
        return sum(node.stats().chunks for node in self.nodes)

    def check_nothing_is_held(self) -> None:
        """No lease, reader or half-written chunk is left on any node."""
        patience = time.monotonic() + 30  # leases are given back without waiting
        while time.monotonic() < patience and any(node.stats().leases for node in self.nodes):
            time.sleep(0.01)
        for node in self.nodes:
            node.check_integrity()
            assert node.stats().leases == 0


@contextmanager
def served_cluster(
    folder: Path,
    nodes: int = 1,
    memory_bytes: int = 256 << 20,
    replicas: int = 1,
    *,
    bulk: bool = False,
    disk_bytes: int = 0,
    canary_models: int = MAX_MODELS,
    experiments: bool = False,
) -> Iterator[ServedCluster]:
    store_type, node_type = (SlowStore, SlowNode) if experiments else (SegmentStore, StorageNode)
    stores = [store_type(folder / f"disk-{i}", disk_bytes) if disk_bytes else None for i in range(nodes)]
    plain = [node_type(f"node-{i}", Arena(memory_bytes), store=store) for i, store in enumerate(stores)]
    servers = [serve_storage(node, host="127.0.0.1") for node in plain]
    ports = [serve_bulk(node, host="127.0.0.1") for node in plain] if bulk else []
    catalogue = FileCatalogue(folder)
    coordinator = Coordinator(catalogue, replicas=replicas)
    calibrations = CalibrationRegistry(folder / "calibrations")
    canaries = CanaryRegistry(folder / "canaries", max_models=canary_models)
    for index, (node, server) in enumerate(zip(plain, servers, strict=True)):
        port = ports[index].address if ports else ""
        coordinator.join(Member(node.node_id, server.address, bulk_endpoint=port), incarnation=1)
    cluster = ServedCluster(
        serve_coordinator(coordinator, calibrations, canaries, address=Address("127.0.0.1", 0)),
        coordinator,
        plain,
        servers,
        ports,
    )
    try:
        yield cluster
    finally:
        cluster.stop_storage()
        cluster.coordinator.stop(0)
        coordinator.close()
        catalogue.close()
        for node in plain:
            node._frames.close()  # without writing what is dirty, as `close` does, perhaps to a slow disk
        for store in stores:
            if store is not None:
                store.close()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[ServedCluster]:
    with served_cluster(tmp_path) as served:
        yield served


@pytest.fixture
def two_node_cluster(tmp_path: Path) -> Iterator[ServedCluster]:
    with served_cluster(tmp_path, nodes=2) as served:
        yield served
