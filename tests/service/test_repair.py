"""Repair between real storage nodes behind real servers, all in this process."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest

from kvstore_api.placement import Member, Placement
from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_api.v1 import kvstore_pb2_grpc as rpc
from kvstore_cluster.arena import Arena
from kvstore_cluster.catalogue import FileCatalogue
from kvstore_cluster.coordinator import Coordinator
from kvstore_cluster.disk import SegmentStore
from kvstore_cluster.durability import Durability
from kvstore_cluster.lookup import LookupRequest
from kvstore_cluster.node import StorageNode
from kvstore_cluster.repair import RepairWorker
from kvstore_codec.errors import ChunkNotFoundError, NodeDrainingError
from kvstore_service.grpc_storage import serve_storage
from kvstore_service.peer_nodes import GrpcPeers
from tests.sample_chunk import SampleChunk, sample_chunk

FAST_BYTES_PER_S = 1e9
KLT = "high-klt-zstd"


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


@pytest.fixture
def make_cluster(tmp_path: Path) -> Iterator[Callable[[int], Cluster]]:
    with ExitStack() as stack:

        def make(replicas: int) -> Cluster:
            catalogue = FileCatalogue(tmp_path)
            stack.callback(catalogue.close)
            coordinator = Coordinator(catalogue, replicas=replicas)
            stack.callback(coordinator.close)
            cluster = Cluster(coordinator)
            stack.callback(lambda: [cell.stop() for cell in cluster.cells.values()])
            return cluster

        yield make


def wait_for(condition: Callable[[], bool], patience_s: float = 15) -> None:
    deadline_s = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def samples(count: int, **options: int) -> list[SampleChunk]:
    return [sample_chunk(number, **options) for number in range(count)]


def test_after_a_loss_every_chunk_is_on_its_owners_again(make_cluster: Callable[[int], Cluster]) -> None:
    cluster = make_cluster(2)
    for name in ("a", "b", "c"):
        cluster.add(name)
    chunks = samples(60)
    cluster.store(chunks)
    cluster.settle()
    assert sum(cell.sent for cell in cluster.cells.values()) == 0
    lost = {chunk.chunk_id for chunk in chunks if cluster.cells["c"].has(chunk)}
    cluster.lose("c")
    cluster.settle()
    assert cluster.whole(chunks)
    # Each of the lost copies once: nobody sends what another one sends.
    assert sum(cell.sent for cell in cluster.cells.values()) == len(lost)
    assert sum(cell.node.stats().counters["puts"] for cell in cluster.cells.values()) == 2 * len(chunks)


def test_the_best_owner_that_has_a_chunk_sends_it(make_cluster: Callable[[int], Cluster]) -> None:
    cluster = make_cluster(4)
    for name in ("a", "b", "c", "d"):
        cluster.add(name)
    chunks = samples(40)
    first: dict[str, int] = dict.fromkeys(cluster.cells, 0)
    for chunk, owners in zip(chunks, cluster.owners(chunks), strict=True):
        for owner in owners[1:3]:
            cluster.cells[owner.node_id].put(chunk)
        first[owners[1].node_id] += 2
    cluster.settle()
    assert cluster.whole(chunks)
    assert {name: cell.sent for name, cell in cluster.cells.items()} == first


def test_a_joined_node_is_filled_at_the_bounded_rate_and_readers_find_everything_meanwhile(
    make_cluster: Callable[[int], Cluster],
) -> None:
    cluster = make_cluster(1)
    for name in ("a", "b"):
        cluster.add(name, bytes_per_s=400e3)
    chunks = samples(60, frame_bytes=2000)
    cluster.store(chunks)
    cluster.settle()
    joined = cluster.add("c", bytes_per_s=400e3)
    cluster.tick()
    began_s = time.monotonic()
    moved = [
        c for c, owners in zip(chunks, cluster.owners(chunks), strict=True) if owners[0] == joined.member
    ]
    assert len(moved) > 10
    seen = set()
    while not cluster.rested():
        assert time.monotonic() - began_s < 30
        readers = cluster.placement().readers([chunk.chunk_id.content_id for chunk in chunks])
        for chunk, members in zip(chunks, readers, strict=True):
            assert any(cluster.cells[member.node_id].has(chunk) for member in members)
        seen.add(joined.node.stats().chunks)
    took_s = time.monotonic() - began_s
    assert cluster.whole(chunks)
    assert joined.node.stats().chunks == len(moved)
    assert len(seen) > 3
    # Two nodes send, each without the last chunk's share of the time.
    by_sender = [cell.worker.counters()["repair_sent_bytes"] for cell in cluster.cells.values()]
    largest = max(len(chunk.data) for chunk in chunks)
    assert took_s > (max(by_sender) - largest) / 400e3


def test_a_draining_node_gives_all_it_has_and_says_when(make_cluster: Callable[[int], Cluster]) -> None:
    cluster = make_cluster(1)
    for name in ("a", "b", "c"):
        cluster.add(name)
    chunks = samples(60)
    cluster.store(chunks)
    cluster.settle()
    held = cluster.cells["a"].node.stats().chunks
    assert held > 5
    late = sample_chunk(1001)
    begun = cluster.cells["a"].node.begin_put(late.chunk_id, late.encoding, len(late.data))
    assert begun is not None
    begun.write(late.data)
    cluster.coordinator.drain("a")
    cluster.tick()
    gauges = cluster.cells["a"].gauges
    assert (gauges["draining"], gauges["drain_left"], gauges["drain_stuck"]) == (1, held, 0)
    wait_for(lambda: cluster.cells["a"].gauges["drain_left"] == 0)
    assert cluster.whole(chunks)
    assert all(owners[0].node_id != "a" for owners in cluster.owners(chunks))
    # Clients of an older membership cannot add to it, not even with what was under way,
    with pytest.raises(NodeDrainingError, match="a is draining"):
        cluster.cells["a"].put(sample_chunk(1000))
    with pytest.raises(NodeDrainingError):
        begun.commit()
    # It still has what it gave, for readers of an older membership, and may go.
    assert cluster.cells["a"].node.stats().chunks == held
    cluster.lose("a")
    cluster.settle()
    assert cluster.whole(chunks)


def test_a_drain_that_cannot_end_says_what_is_left(make_cluster: Callable[[int], Cluster]) -> None:
    cluster = make_cluster(1)
    cluster.add("a")
    chunks = samples(40)
    cluster.store(chunks)
    cluster.add("b", memory_bytes=256 << 10)
    cluster.coordinator.drain("a")
    full = cluster.cells["b"]
    others = [sample_chunk(number) for number in range(100, 140)]
    for chunk in others:
        full.put(chunk)
    evicted = full.node.stats().counters["evictions"]
    lease = full.node.lookup(
        LookupRequest([chunk.chunk_id for chunk in others], ["exact-zstd"], lease_s=60)
    ).lease_id
    assert lease is not None
    cluster.tick()
    wait_for(lambda: cluster.rested())
    gauges = cluster.cells["a"].gauges
    assert gauges["drain_left"] == gauges["drain_stuck"] == len(chunks)
    full.node.release_lease(lease)
    cluster.coordinator.drain("b")  # it has no room, so others take what it would own
    cluster.add("c")
    cluster.tick()
    wait_for(lambda: cluster.cells["a"].gauges["drain_left"] == 0)
    assert cluster.whole(chunks)
    assert full.node.stats().counters["evictions"] == evicted


def test_the_only_copy_is_not_given_to_nobody(make_cluster: Callable[[int], Cluster]) -> None:
    cluster = make_cluster(1)
    for name in ("a", "b"):
        cluster.add(name)
    chunks = samples(20)
    cluster.store(chunks)
    for name in ("a", "b"):
        cluster.coordinator.drain(name)
    cluster.settle()
    for cell in cluster.cells.values():
        held = cell.node.stats().chunks
        assert held
        assert (cell.gauges["drain_left"], cell.gauges["drain_stuck"]) == (held, held)


def test_what_a_draining_node_gives_pushes_nothing_out(make_cluster: Callable[[int], Cluster]) -> None:
    cluster = make_cluster(1)
    cluster.add("a")
    chunks = samples(60, frame_bytes=4000)
    cluster.store(chunks)
    small = cluster.add("b", memory_bytes=1 << 20)
    cluster.coordinator.drain("a")
    cluster.settle()
    wait_for(lambda: cluster.cells["a"].gauges["drain_left"] == cluster.cells["a"].gauges["drain_stuck"])
    given = small.node.stats().chunks
    assert 0 < given < len(chunks)
    assert cluster.cells["a"].gauges["drain_left"] == len(chunks) - given
    assert small.node.stats().counters["evictions"] == 0


def test_a_change_of_the_membership_ends_the_walk(make_cluster: Callable[[int], Cluster]) -> None:
    cluster = make_cluster(1)
    slow = cluster.add("a", bytes_per_s=20e3)
    chunks = samples(40, frame_bytes=4000)
    cluster.store(chunks)
    cluster.add("b")
    cluster.tick()
    wait_for(lambda: slow.sent > 0)
    cluster.lose("b")
    began_s = time.monotonic()
    cluster.settle()
    # It would have gone on for a minute.
    assert time.monotonic() - began_s < 5
    assert slow.sent < 10
    assert slow.worker.counters()["repair_failed"] <= 1
    assert cluster.whole(chunks)


def test_a_chunk_of_another_calibration_is_left_alone(make_cluster: Callable[[int], Cluster]) -> None:
    cluster = make_cluster(2)
    a, b = cluster.add("a"), cluster.add("b")
    ours = [sample_chunk(n, encoding=KLT, calibration=b"1" * 32) for n in range(10)]
    theirs = [sample_chunk(n, encoding=KLT, calibration=b"2" * 32) for n in range(10)]
    for mine, other in zip(ours, theirs, strict=True):
        a.put(mine)
        b.put(other)
    # The same chunk in another encoding is a chunk of its own.
    exact = samples(10)
    for chunk in exact:
        a.put(chunk)
    for _ in range(3):
        before = cluster.coordinator.repair()
        cluster.tick()
        wait_for(
            lambda: all(cell.gauges["repair_round"] == before for cell in (a, b))  # noqa: B023
        )
    assert all(a.has(chunk) for chunk in ours)
    assert all(b.has(chunk) for chunk in (*theirs, *exact))
    assert (a.sent, b.sent) == (10, 0)


def test_a_full_node_is_not_given_again_what_it_evicted(make_cluster: Callable[[int], Cluster]) -> None:
    cluster = make_cluster(2)
    large = cluster.add("a", period_s=0.2)
    small = cluster.add("b", memory_bytes=512 << 10)
    chunks = samples(60)
    cluster.store(chunks)
    assert small.node.stats().counters["evictions"] > 0
    cluster.settle()
    sent, evictions = large.sent, small.node.stats().counters["evictions"]
    time.sleep(1.5)  # several walks in which nothing has changed
    assert (large.sent, small.node.stats().counters["evictions"]) == (sent, evictions)


def test_what_was_stored_elsewhere_meanwhile_comes_to_its_owner(
    make_cluster: Callable[[int], Cluster],
) -> None:
    cluster = make_cluster(1)
    for name in ("a", "b"):
        cluster.add(name, period_s=0.2)
    cluster.settle()
    chunks = samples(20)
    for chunk, owners in zip(chunks, cluster.owners(chunks), strict=True):
        cluster.cells["b" if owners[0].node_id == "a" else "a"].put(chunk)
    wait_for(lambda: cluster.whole(chunks))


def test_a_silent_node_does_not_stop_the_others(make_cluster: Callable[[int], Cluster]) -> None:
    cluster = make_cluster(2)
    for name in ("a", "b", "c"):
        cluster.add(name)
    chunks = samples(40)
    # Nobody answers for d, and the coordinator has not noticed yet.
    cluster.store(chunks)
    cluster.coordinator.join(Member("d", "127.0.0.1:1"), 1)
    cluster.cells["a"].node.delete([chunk.chunk_id for chunk in chunks])
    cluster.tick()
    owned = [
        c
        for c, owners in zip(chunks, cluster.owners(chunks), strict=True)
        if "d" not in {m.node_id for m in owners}
    ]
    assert owned
    wait_for(lambda: cluster.whole(owned))
    assert not cluster.rested()


def test_stopping_does_not_wait_for_the_rate(make_cluster: Callable[[int], Cluster]) -> None:
    cluster = make_cluster(1)
    slow = cluster.add("a", bytes_per_s=1e3)
    chunks = samples(20)
    cluster.store(chunks)
    cluster.add("b")
    cluster.tick()
    wait_for(lambda: slow.sent > 0)
    began_s = time.monotonic()
    slow.worker.stop()
    assert time.monotonic() - began_s < 2


def test_copies_keep_what_was_said_of_the_original(make_cluster: Callable[[int], Cluster]) -> None:
    cluster = make_cluster(1)
    cluster.add("a")
    chunk = sample_chunk(3)
    start = pb.PutStart(
        chunk=pb.ChunkRef(content_id=chunk.chunk_id.content_id, prefix_id=chunk.chunk_id.prefix_id),
        encoding=chunk.encoding,
        size_bytes=len(chunk.data),
        ttl_s=1000,
        tenant="blue",
        cost=7.5,
    )
    steps = [pb.PutRequest(start=start), pb.PutRequest(data=chunk.data), pb.PutRequest(end=pb.PutEnd())]
    with grpc.insecure_channel(cluster.cells["a"].server.address) as channel:
        (reply,) = rpc.StorageStub(channel).Put(iter(steps))
    assert reply.status == pb.PUT_STATUS_STORED
    receiver = cluster.add("b")
    cluster.coordinator.drain("a")
    cluster.tick()
    wait_for(lambda: receiver.has(chunk))
    ((copy,), cursor) = receiver.node.list(0, 10)
    assert (copy.chunk_id, copy.encoding, cursor) == (chunk.chunk_id, chunk.encoding, 0)
    assert (copy.tenant, copy.cost) == ("blue", 7.5)
    assert 900 < copy.ttl_left_s <= 1000


def test_copies_of_what_is_on_disk_are_on_disk(
    make_cluster: Callable[[int], Cluster], tmp_path: Path
) -> None:
    cluster = make_cluster(2)
    cluster.add("a", disk=tmp_path / "a")
    chunks = samples(5)
    cluster.store(chunks)
    receiver = cluster.add("b", disk=tmp_path / "b", durability=Durability.MEMORY)
    cluster.settle()
    variants, _ = receiver.node.list(0, 10)
    assert [variant.on_disk for variant in variants] == [True] * len(chunks)


def test_a_node_without_disk_takes_copies_of_what_is_on_disk(
    make_cluster: Callable[[int], Cluster], tmp_path: Path
) -> None:
    cluster = make_cluster(2)
    cluster.add("a", disk=tmp_path / "a")
    chunks = samples(5)
    cluster.store(chunks)
    cluster.add("b")
    cluster.settle()
    assert cluster.whole(chunks)
    assert cluster.cells["a"].gauges["repair_left"] == 0


def test_a_node_that_refuses_copies_does_not_keep_repair_from_ending(
    make_cluster: Callable[[int], Cluster],
) -> None:
    cluster = make_cluster(2)
    sender = cluster.add("a")
    chunks = samples(5)
    cluster.store(chunks)
    cluster.add("b", durability=Durability.DURABLE)  # and no disk
    cluster.settle()
    assert sender.gauges["repair_left"] == len(chunks)
