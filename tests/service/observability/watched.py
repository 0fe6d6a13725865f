"""A small cluster whose metrics are served, all in this process and behind real servers, and workers that use it."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from kvstore_api.placement import Member
from kvstore_client import KVStoreClient
from kvstore_client.new_chunk import NewChunk
from kvstore_cluster.arena import Arena
from kvstore_cluster.calibrations import CalibrationRegistry
from kvstore_cluster.canaries import CanaryRegistry
from kvstore_cluster.catalogue import FileCatalogue
from kvstore_cluster.coordinator import Coordinator
from kvstore_cluster.encryption import KeySource
from kvstore_cluster.maintenance import MaintenanceThread
from kvstore_cluster.repair import RepairWorker
from kvstore_cluster.slow_disk import SlowNode, SlowStore
from kvstore_codec.identity import ChunkId
from kvstore_service.bulk_server import serve_bulk
from kvstore_service.cluster_stats import cluster_stats
from kvstore_service.experiments import Experiments
from kvstore_service.grpc_coordinator import CoordinatorServer, serve_coordinator
from kvstore_service.grpc_storage import serve_storage
from kvstore_service.listen import Address
from kvstore_service.metrics import ClusterCollector
from kvstore_service.peer_nodes import GrpcPeers
from tests.client.chunks import SPEC, random_kv
from tests.cluster.disk.test_faults import Faults

HOST = "127.0.0.1"
_TICK_S = 0.5


class WatchedNode:
    """A storage node with its disk, if it has one, its servers and its background threads."""

    def __init__(
        self, node_id: str, folder: Path, memory_bytes: int, disk_bytes: int, keys: KeySource | None = None
    ) -> None:
        self.faults = Faults()
        self.store = (
            SlowStore(
                folder / node_id,
                disk_bytes,
                keys=keys,
                segment_bytes=4 << 20,
                sync_period_s=0.1,
                open_file=self.faults.open_file,
            )
            if disk_bytes
            else None
        )
        arena = Arena(memory_bytes, 4 << 10)
        self.node = SlowNode(node_id, arena, store=self.store)
        self.repair = RepairWorker(self.node, GrpcPeers(self.node), bytes_per_s=1e9)
        self.experiments = Experiments(self.node)
        bulk = serve_bulk(self.node, host=HOST, source=self.experiments)
        server = serve_storage(
            self.node,
            host=HOST,
            repair=self.repair,
            bulk_endpoint=bulk.address,
            experiments=self.experiments,
        )
        self.servers = (server, bulk)
        self.member = Member(node_id, server.address, bulk_endpoint=bulk.address)
        self.maintenance = MaintenanceThread(self.node, arena)
        self.is_up = True
        for thread in (self.repair, self.maintenance):
            thread.start()

    def stop_serving(self) -> None:
        """As far as others can tell, the node is dead."""
        self.is_up = False
        for server in self.servers:
            server.stop(0)

    def close(self) -> None:
        self.faults.syncing = self.faults.writing = self.faults.reading = None
        self.experiments.end()
        self.stop_serving()
        self.repair.stop()
        self.maintenance.stop()
        self.node.check_integrity()
        self.node.close()


class WatchedCluster:
    def __init__(self, coordinator: Coordinator, nodes: list[WatchedNode], server: CoordinatorServer) -> None:
        self.coordinator, self.nodes, self.server = coordinator, nodes, server
        self.address = server.address
        self.collector = ClusterCollector(lambda: cluster_stats(self.address), tenants=2)

    def tell(self) -> None:
        """Let the nodes hear what the coordinator has decided."""
        for number, watched in enumerate(self.nodes):
            if watched.is_up:
                self.coordinator.join(watched.member, number + 1)
                told = self.coordinator.directives(watched.member.node_id, 0)
                watched.node.set_pins(told.pins or {})
                watched.node.set_quotas(told.quotas or {})
                watched.node.set_draining(told.draining)
                watched.repair.update(told)


@contextmanager
def watched_cluster(
    folder: Path,
    nodes: int = 2,
    *,
    memory_bytes: int = 8 << 20,
    disk_bytes: int = 32 << 20,
    replicas: int = 2,
    keys: KeySource | None = None,
) -> Iterator[WatchedCluster]:
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as running:
        catalogue = FileCatalogue(folder)
        running.callback(catalogue.close)
        coordinator = Coordinator(catalogue, replicas=replicas)
        running.callback(coordinator.close)
        watched = []
        for number in range(nodes):
            watched.append(WatchedNode(f"node-{number}", folder, memory_bytes, disk_bytes, keys))
            running.callback(watched[-1].close)
            coordinator.join(watched[-1].member, number + 1)
        server = serve_coordinator(
            coordinator,
            CalibrationRegistry(folder / "calibrations"),
            CanaryRegistry(folder / "canaries"),
            address=Address(HOST, 0),
        )
        running.callback(server.stop, 0)
        cluster = WatchedCluster(coordinator, watched, server)
        cluster.tell()
        ended = threading.Event()

        def keep_telling() -> None:
            while not ended.wait(_TICK_S):
                cluster.tell()

        thread = threading.Thread(target=keep_telling)
        thread.start()
        running.callback(thread.join)
        running.callback(ended.set)
        yield cluster


def put(client: KVStoreClient, chunks: list[ChunkId], seed: int = 0) -> int:
    """Number of chunks that were stored."""
    new = [NewChunk(chunk, lambda i=index: random_kv(seed + i)) for index, chunk in enumerate(chunks)]  # type: ignore[misc]
    return client.store.put(SPEC, new).result(60)


def fetch(client: KVStoreClient, chunks: list[ChunkId]) -> int:
    """Number of chunks that arrived."""
    match = client.match(SPEC, chunks)
    if not match.chunks:
        return 0
    buffers = client.buffers.acquire(SPEC, match.tokens)
    try:
        return client.fetch(match, buffers, None).wait().fetched
    finally:
        client.buffers.release(buffers)
