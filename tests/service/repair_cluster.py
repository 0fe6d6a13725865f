"""Storage nodes that repair each other, with real servers, all in this process."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from kvstore_api.placement import Member, Placement
from kvstore_cluster.arena import Arena
from kvstore_cluster.coordinator import Coordinator
from kvstore_cluster.disk import SegmentStore
from kvstore_cluster.durability import Durability
from kvstore_cluster.node import StorageNode
from kvstore_cluster.repair import RepairWorker
from kvstore_codec.errors import ChunkNotFoundError
from kvstore_service.grpc_storage import serve_storage
from kvstore_service.peer_nodes import GrpcPeers
from tests.sample_chunk import SampleChunk, sample_chunk

FAST_BYTES_PER_S = 1e9


class Cell:
    """A storage node with its server and its repair worker."""

    def __init__(
        self,
        node_id: str,
        *,
        memory_bytes: int = 16 << 20,
        disk: Path | None = None,
        durability: Durability = Durability.RELAXED,
        bytes_per_s: float = FAST_BYTES_PER_S,
        period_s: float = 300,
    ) -> None:
        store = SegmentStore(disk, 64 << 20, segment_bytes=4 << 20) if disk is not None else None
        self.node = StorageNode(node_id, Arena(memory_bytes, 4 << 10), store=store, durability=durability)
        self.server = serve_storage(self.node, host="127.0.0.1")
        self.member = Member(node_id, self.server.address)
        self.worker = RepairWorker(
            self.node, GrpcPeers(self.node), bytes_per_s=bytes_per_s, period_s=period_s
        )
        self.worker.start()

    @property
    def sent(self) -> int:
        return self.worker.counters()["repair_sent"]

    @property
    def gauges(self) -> dict[str, int]:
        return self.worker.gauges(self.node.stats().chunks)

    def put(self, chunk: SampleChunk) -> None:
        put = self.node.begin_put(chunk.chunk_id, chunk.encoding, len(chunk.data), chunk.header.calibration)
        if put is not None:
            put.write(chunk.data)
            assert put.commit()

    def has(self, chunk: SampleChunk) -> bool:
        """Whether a client finds it there, with the right bytes."""
        try:
            with self.node.open(chunk.chunk_id, chunk.encoding) as reader:
                frames = reader.header.geometry.frame_count
                data = b"".join(bytes(view) for views in reader.pieces(0, frames, 1 << 20) for view in views)
        except ChunkNotFoundError:
            return False
        return data == chunk.frames(0, frames)

    def wait_for_walks(self, count: int) -> None:
        """Wait until that many more walks have ended."""
        for _ in range(count):
            last = self.worker._finished
            wait_for(lambda last=last: self.worker._finished is not last)  # type: ignore[misc]

    def stop(self) -> None:
        self.worker.stop()
        self.server.stop(0)
        self.node.check_integrity()
        self.node.close()


class Cluster:
    """Cells under one coordinator, which `tick` lets them hear."""

    def __init__(self, coordinator: Coordinator) -> None:
        self.coordinator = coordinator
        self.cells: dict[str, Cell] = {}
        self._incarnations = 0

    def add(self, node_id: str, **options: object) -> Cell:
        cell = self.cells[node_id] = Cell(node_id, **options)  # type: ignore[arg-type]
        self._incarnations += 1
        self.coordinator.join(cell.member, self._incarnations)
        return cell

    def lose(self, node_id: str) -> None:
        self.cells.pop(node_id).stop()
        (record,) = [n for n in self.coordinator.nodes() if n.member.node_id == node_id]
        self.coordinator.mark_dead(node_id, record.incarnation, "lost")

    def tick(self) -> None:
        for node_id, cell in self.cells.items():
            directives = self.coordinator.directives(node_id, 0)
            cell.node.set_draining(directives.draining)
            cell.worker.update(directives)

    def placement(self) -> Placement:
        membership = self.coordinator.membership()
        return Placement(membership.members, membership.replicas)

    def store(self, chunks: Sequence[SampleChunk]) -> None:
        for chunk, owners in zip(chunks, self.owners(chunks), strict=True):
            for owner in owners:
                self.cells[owner.node_id].put(chunk)

    def owners(self, chunks: Sequence[SampleChunk]) -> list[tuple[Member, ...]]:
        return self.placement().owners([chunk.chunk_id.content_id for chunk in chunks])

    def whole(self, chunks: Sequence[SampleChunk]) -> bool:
        """Whether every chunk is on all of its owners."""
        return all(
            all(self.cells[owner.node_id].has(chunk) for owner in owners)
            for chunk, owners in zip(chunks, self.owners(chunks), strict=True)
        )

    def rested(self) -> bool:
        """Whether every node has finished a walk in the membership of now."""
        epoch = self.coordinator.membership().epoch
        return all(
            cell.gauges["repair_epoch"] == epoch and not cell.gauges["repair_running"]
            for cell in self.cells.values()
        )

    def settle(self) -> None:
        self.tick()
        wait_for(self.rested)


def wait_for(condition: Callable[[], bool], patience_s: float = 60) -> None:
    deadline_s = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def samples(count: int, **options: int) -> list[SampleChunk]:
    return [sample_chunk(number, **options) for number in range(count)]
