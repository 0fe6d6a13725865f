"""A storage node with a disk: what is written through or back, moves between the tiers, and survives a restart."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvstore_cluster.arena import Arena
from kvstore_cluster.disk import SegmentStore
from kvstore_cluster.durability import Durability
from kvstore_cluster.eviction import POLICIES
from kvstore_cluster.leases import LeaseTable
from kvstore_cluster.node import StorageNode
from kvstore_cluster.put import PutOptions
from kvstore_cluster.scrub import scrub
from kvstore_codec.errors import ArenaFullError, ChunkNotFoundError, NotDurableError, OverQuotaError
from tests.sample_chunk import SampleChunk, sample_chunk

MEMORY = 1 << 20
DISK = 16 << 20
SEGMENT = 1 << 20
BLOCK = 4 << 10
FRAME = 6000  # chunks of about 70 KB: fourteen fit into memory


class Clock:
    now_s = 1e9

    def __call__(self) -> float:
        return self.now_s


Opener = Callable[..., StorageNode]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def opened(tmp_path: Path, clock: Clock) -> Iterator[Opener]:
    """Opens the node on the same disk; the one opened before is given up without a farewell."""
    nodes: list[tuple[StorageNode, SegmentStore]] = []

    def start(
        *, disk_bytes: int = DISK, policy: str = "lru", durability: Durability = Durability.RELAXED
    ) -> StorageNode:
        if nodes:
            nodes[-1][1].close()
        store = SegmentStore(tmp_path / "disk", disk_bytes, segment_bytes=SEGMENT)
        node = StorageNode(
            "node-0",
            Arena(MEMORY, BLOCK),
            store=store,
            durability=durability,
            policy=POLICIES[policy],
            leases=LeaseTable(clock=clock),
            clock=clock,
        )
        nodes.append((node, store))
        return node

    yield start
    nodes[-1][0].check_integrity()
    nodes[-1][1].close()


def chunk_of(number: int, encoding: str = "exact-zstd") -> SampleChunk:
    return sample_chunk(content=number, encoding=encoding, frame_bytes=FRAME)


def put(node: StorageNode, chunk: SampleChunk, **options: object) -> bool:
    pending = node.begin_put(
        chunk.chunk_id,
        chunk.encoding,
        len(chunk.data),
        options=PutOptions(**options),  # type: ignore[arg-type]
    )
    if pending is None:
        return False
    data = memoryview(chunk.data)
    for view in pending.views():
        view[:] = data[: view.nbytes]
        data = data[view.nbytes :]
        pending.advance(view.nbytes)
    return pending.commit()


def read(node: StorageNode, chunk: SampleChunk, first: int = 0, count: int = 0) -> bytes:
    with node.open(chunk.chunk_id, chunk.encoding) as reader:
        return b"".join(view for piece in reader.pieces(first, count, 10_000) for view in piece)


def stored(node: StorageNode, chunk: SampleChunk) -> bool:
    return node.lookup([chunk.chunk_id], [chunk.encoding], peek=True).answers[0].encoding is not None


def test_what_does_not_fit_into_memory_is_on_disk(opened: Opener) -> None:
    node = opened()
    chunks = [chunk_of(number) for number in range(40)]
    for chunk in chunks:
        assert put(node, chunk)
    stats = node.stats()
    assert (stats.chunks, stats.gauges["disk_chunks"], stats.counters["evictions"]) == (40, 40, 0)
    assert stats.counters["demotions"] == 40 - stats.gauges["memory_chunks"] > 0
    answers = node.lookup([chunk.chunk_id for chunk in chunks], ["exact-zstd"]).answers
    assert [answer.header for answer in answers] == [
        chunk.data[: chunk.header.header_bytes] for chunk in chunks
    ]
    assert [answer.on_disk for answer in answers].count(True) == stats.counters["demotions"]
    for chunk in chunks:
        assert read(node, chunk) == chunk.data
    node.check_integrity()


def test_a_read_of_most_of_a_chunk_brings_it_into_memory_a_small_one_does_not(opened: Opener) -> None:
    node = opened()
    chunks = [chunk_of(number) for number in range(40)]
    for chunk in chunks:
        put(node, chunk)
    first = chunks[0]
    assert read(node, first, 2, 1) == first.frames(2, 1)
    assert node.stats().counters["promotions"] == 0
    assert read(node, first, 0, 7) == first.frames(0, 7)
    assert node.stats().counters["promotions"] == 1
    (answer,) = node.lookup([first.chunk_id], [first.encoding]).answers
    assert not answer.on_disk


def test_everything_written_through_is_there_after_a_restart(opened: Opener) -> None:
    node = opened()
    chunks = [chunk_of(number) for number in range(30)]
    for chunk in chunks:
        put(node, chunk, tenant="acme", cost=7.5)
    node = opened()
    assert node.stats().chunks == 30
    for chunk in chunks:
        assert read(node, chunk) == chunk.data
    (variant, *_), _ = node.list()
    assert (variant.tenant, variant.cost, variant.on_disk) == ("acme", 7.5, True)


def test_what_was_deleted_stays_deleted_and_what_was_put_again_comes_back(opened: Opener) -> None:
    node = opened()
    first, second = chunk_of(0), chunk_of(1)
    for chunk in (first, second):
        put(node, chunk)
        assert node.delete([chunk.chunk_id]) == 1
    put(node, second)
    node = opened()
    assert (stored(node, first), stored(node, second)) == (False, True)


def test_write_back_reaches_the_disk_later(opened: Opener) -> None:
    node = opened(durability=Durability.MEMORY)
    chunk = chunk_of(0)
    put(node, chunk)
    assert (node.stats().gauges["dirty"], node.stats().gauges["disk_chunks"]) == (1, 0)
    assert not put(node, chunk)
    while node.maintain():
        pass
    assert (node.stats().gauges["dirty"], node.stats().gauges["disk_chunks"]) == (0, 1)
    assert stored(opened(), chunk)


def test_a_durable_put_of_what_is_only_in_memory_writes_it(opened: Opener) -> None:
    node = opened()
    chunk = chunk_of(0)
    put(node, chunk, durability=Durability.MEMORY)
    assert not put(node, chunk, durability=Durability.DURABLE)
    assert node.stats().gauges["disk_chunks"] == 1
    node.check_integrity()
    assert stored(opened(), chunk)


def test_dirty_chunks_are_not_lost_for_room(opened: Opener) -> None:
    node = opened(durability=Durability.MEMORY)
    chunks = [chunk_of(number) for number in range(40)]
    for chunk in chunks:
        try:
            put(node, chunk)
        except ArenaFullError:
            while node.maintain():
                pass
            put(node, chunk)
    while node.maintain():
        pass
    assert all(read(node, chunk) == chunk.data for chunk in chunks)


def test_durable_without_a_disk_is_refused(opened: Opener) -> None:
    opened()
    node = StorageNode("node-1", Arena(MEMORY, BLOCK))
    with pytest.raises(NotDurableError, match="has no disk"):
        put(node, chunk_of(0), durability=Durability.DURABLE)
    assert put(node, chunk_of(0), durability=Durability.RELAXED)


def test_a_full_disk_evicts_and_compacts(opened: Opener) -> None:
    node = opened(disk_bytes=4 << 20)
    for number in range(200):
        put(node, chunk_of(number))
        if number % 10 == 0:
            node.maintain()
    stats = node.stats()
    assert stats.counters["evictions"] > 100
    assert stats.gauges["disk_bytes_used"] <= 4 << 20
    assert stored(node, chunk_of(199))
    node.check_integrity()
    node = opened(disk_bytes=4 << 20)
    variants, _ = node.list()
    assert all(read(node, chunk_of(number)) == chunk_of(number).data for number in range(190, 200))
    assert len(variants) == node.stats().chunks


def test_pinned_chunks_are_demoted_but_never_evicted(opened: Opener) -> None:
    node = opened(disk_bytes=4 << 20)
    kept = chunk_of(1000)
    node.set_pins({kept.chunk_id})
    put(node, kept)
    for number in range(150):
        put(node, chunk_of(number))
    assert read(node, kept) == kept.data
    assert node.stats().gauges["pinned"] == 1
    node.set_pins(set())
    for number in range(150, 300):
        put(node, chunk_of(number))
    assert not stored(node, kept)


def test_chunks_expire(opened: Opener, clock: Clock) -> None:
    node = opened()
    short, long = chunk_of(0), chunk_of(1)
    put(node, short, ttl_s=10.0)
    put(node, long, ttl_s=1000.0)
    clock.now_s += 20
    assert (stored(node, short), stored(node, long)) == (False, True)
    with pytest.raises(ChunkNotFoundError):
        read(node, short)
    assert node.stats().chunks == 2
    node.maintain()
    assert (node.stats().chunks, node.stats().counters["expired"]) == (1, 1)
    assert put(node, short, ttl_s=10.0)
    clock.now_s -= 10_000  # the clock goes back: chunks live longer, none is lost
    assert stored(node, short)


def test_an_expired_chunk_can_be_put_again_at_once(opened: Opener, clock: Clock) -> None:
    node = opened()
    chunk = chunk_of(0)
    put(node, chunk, ttl_s=10.0)
    clock.now_s += 20
    assert put(node, chunk)
    assert read(node, chunk) == chunk.data
    assert node.stats().chunks == 1


def test_a_quota_evicts_what_its_tenant_used_least_lately(opened: Opener) -> None:
    node = opened()
    size_bytes = len(chunk_of(0).data)
    other = chunk_of(500)
    put(node, other, tenant="other")
    put(node, chunk_of(0), tenant="acme")
    node.set_quotas({"acme": 4 * 100_000})
    for number in range(1, 20):
        put(node, chunk_of(number), tenant="acme")
    mine, _ = node.list(tenant="acme")
    assert sum(variant.size_bytes for variant in mine) <= 400_000
    assert stored(node, other)
    assert stored(node, chunk_of(19))
    lease = node.lookup([variant.chunk_id for variant in mine], ["exact-zstd"], lease_s=60.0)
    with pytest.raises(OverQuotaError, match="acme"):
        put(node, chunk_of(20), tenant="acme")
    assert lease.lease_id is not None
    node.release_lease(lease.lease_id)
    assert put(node, chunk_of(20), tenant="acme")
    assert size_bytes


def test_damage_on_disk_is_found_and_dropped(opened: Opener, tmp_path: Path) -> None:
    node = opened()
    chunks = [chunk_of(number) for number in range(30)]
    for chunk in chunks:
        put(node, chunk)
    for segment in (tmp_path / "disk").glob("*.kvs"):
        data = bytearray(segment.read_bytes())
        position = data.find(chunks[0].data[5000:5100])
        if position >= 0:
            data[position] ^= 1
            segment.write_bytes(data)
    progress = list(scrub(node))
    (damage,) = [damage for step in progress for damage in step.damaged]
    assert damage.variant.chunk_id == chunks[0].chunk_id
    assert progress[-1].checked == 30
    assert not stored(node, chunks[0])
    assert not [damage for step in scrub(node) for damage in step.damaged]


def test_a_damaged_chunk_is_never_given_out(opened: Opener, tmp_path: Path) -> None:
    node = opened()
    chunk = chunk_of(0)
    put(node, chunk)
    node = opened()
    (segment,) = (
        path for path in (tmp_path / "disk").glob("*.kvs") if chunk.data[5000:5100] in path.read_bytes()
    )
    data = bytearray(segment.read_bytes())
    data[data.find(chunk.data[5000:5100])] ^= 1
    segment.write_bytes(data)
    with pytest.raises(ChunkNotFoundError, match="damaged"):
        read(node, chunk)
    assert node.stats().counters["damaged"] == 1
    assert put(node, chunk)
    assert read(node, chunk) == chunk.data


def test_pages_of_a_listing_cover_everything(opened: Opener) -> None:
    node = opened()
    chunks = [chunk_of(number) for number in range(25)]
    for chunk in chunks:
        put(node, chunk)
    listed, cursor = [], 0
    while True:
        page, cursor = node.list(cursor, 10)
        listed += page
        if not cursor:
            break
    assert sorted(variant.chunk_id.content_id for variant in listed) == sorted(
        chunk.chunk_id.content_id for chunk in chunks
    )
    wanted = chunks[3].chunk_id.content_id
    (found,), _ = node.list(content_prefix=wanted[:8])
    assert found.chunk_id == chunks[3].chunk_id
