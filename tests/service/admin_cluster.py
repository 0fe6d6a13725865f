"""A cluster of real servers in this process, for commands that look after it."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from kvstore_api.placement import Member, Placement
from kvstore_cluster.arena import Arena
from kvstore_cluster.calibrations import CalibrationRegistry
from kvstore_cluster.canaries import CanaryRegistry
from kvstore_cluster.catalogue import FileCatalogue
from kvstore_cluster.coordinator import Coordinator
from kvstore_cluster.disk import SegmentStore
from kvstore_cluster.lookup import LookupRequest
from kvstore_cluster.node import StorageNode
from kvstore_cluster.put import PutOptions
from kvstore_cluster.repair import RepairWorker
from kvstore_codec.errors import KVStoreError
from kvstore_service.cli.app import app
from kvstore_service.grpc_coordinator import CoordinatorServer, serve_coordinator
from kvstore_service.grpc_server import GrpcServer
from kvstore_service.grpc_storage import serve_storage
from kvstore_service.listen import Address
from kvstore_service.peer_nodes import GrpcPeers
from tests.sample_chunk import SampleChunk, sample_chunk

TENANTS = ("", "blue")


@dataclass
class Cell:
    node: StorageNode
    server: GrpcServer
    worker: RepairWorker
    member: Member
    incarnation: int


@dataclass
class Cluster:
    coordinator: Coordinator
    server: CoordinatorServer
    cells: dict[str, Cell] = field(default_factory=dict)
    chunks: list[SampleChunk] = field(default_factory=list)
    away: set[str] = field(default_factory=set)
    """Nodes that do not hear of news. Change it with `hearing` held."""
    hearing: threading.Lock = field(default_factory=threading.Lock)

    def kvstore(self, *arguments: str, stdin: str | None = None) -> Any:
        """Runs a command, which prints JSON."""
        result = CliRunner().invoke(
            app, [*arguments, "--address", self.server.address, "--json"], input=stdin
        )
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return json.loads(result.stdout)

    def text(self, *arguments: str, stdin: str | None = None, status: int = 0) -> str:
        """Runs a command, which prints for a person."""
        result = CliRunner().invoke(
            app, [*arguments, "--address", self.server.address], input=stdin, env={"COLUMNS": "200"}
        )
        if isinstance(result.exception, KVStoreError):
            raise result.exception
        assert result.exit_code == status, result.output
        return result.output

    def stored(self, chunk: SampleChunk) -> set[str]:
        return {
            name
            for name, cell in self.cells.items()
            if cell.node.lookup(LookupRequest([chunk.chunk_id], [chunk.encoding], peek=True))
            .answers[0]
            .encoding
        }


@contextmanager
def administered(tmp_path: Path) -> Iterator[Cluster]:
    """Two nodes with disks, R=1, 20 chunks, every second one of tenant `blue`; they hear of news within .1 s."""
    catalogue = FileCatalogue(tmp_path)
    coordinator = Coordinator(catalogue)
    registry = CalibrationRegistry(tmp_path / "calibrations")
    canaries = CanaryRegistry(tmp_path / "canaries")
    server = serve_coordinator(coordinator, registry, canaries, address=Address("127.0.0.1", 0))
    cluster = Cluster(coordinator, server)
    for number in range(2):
        store = SegmentStore(tmp_path / f"disk-{number}", 64 << 20, segment_bytes=4 << 20)
        node = StorageNode(f"node-{number}", Arena(4 << 20, 4 << 10), store=store)
        worker = RepairWorker(node, GrpcPeers(node), bytes_per_s=1e9)
        server = serve_storage(node, host="127.0.0.1", repair=worker)
        worker.start()
        member = Member(node.node_id, server.address)
        cluster.cells[node.node_id] = Cell(node, server, worker, member, number + 1)
        coordinator.join(member, number + 1)
    placement = Placement(coordinator.membership().members)
    cluster.chunks = [sample_chunk(number) for number in range(20)]
    for number, chunk in enumerate(cluster.chunks):
        (owner,) = placement.owners([chunk.chunk_id.content_id])[0]
        options = PutOptions(tenant=TENANTS[number % 2])
        put = cluster.cells[owner.node_id].node.begin_put(
            chunk.chunk_id, chunk.encoding, len(chunk.data), options=options
        )
        assert put is not None
        put.write(chunk.data)
        assert put.commit()
    stopping = threading.Event()

    def keep_informed() -> None:
        while not stopping.wait(0.1):
            with cluster.hearing:
                for name, cell in cluster.cells.items():
                    if name in cluster.away:
                        continue
                    directives = coordinator.register(
                        cell.member, cell.incarnation, 0, cell.node.forgotten_generation
                    )
                    assert directives.pins is not None
                    cell.node.forget(directives.forgotten)
                    cell.node.set_pins(directives.pins)
                    cell.node.set_draining(directives.draining)
                    cell.worker.update(directives)

    informing = threading.Thread(target=keep_informed)
    informing.start()
    yield cluster
    stopping.set()
    informing.join()
    for cell in cluster.cells.values():
        cell.worker.stop()
        cell.server.stop(0)
        cell.node.check_integrity()
        cell.node.close()
    cluster.server.stop(0)
    coordinator.close()
    catalogue.close()


def names(chunks: list[SampleChunk]) -> set[str]:
    return {f"{chunk.chunk_id.content_id.hex()}+{chunk.chunk_id.prefix_id.hex()}" for chunk in chunks}


def listed(report: dict[str, Any]) -> set[str]:
    return {f"{row['content_id']}+{row['prefix_id']}" for row in report["chunks"]}
