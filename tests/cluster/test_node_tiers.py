"""A storage node with a disk: what is written through or back, moves between the tiers, and survives a restart."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvstore_cluster.arena import Arena
from kvstore_cluster.disk import SegmentStore
from kvstore_cluster.durability import Durability
from kvstore_cluster.eviction import POLICIES
from kvstore_cluster.leases import LeaseTable
from kvstore_cluster.lookup import LookupRequest
from kvstore_cluster.node import StorageNode
from kvstore_cluster.put import PutOptions
from kvstore_cluster.scrub import scrub
from kvstore_cluster.slow_disk import SlowNode, SlowStore
from kvstore_codec.chunk import write_header
from kvstore_codec.errors import (
    ArenaFullError,
    ChunkNotFoundError,
    ConfigurationError,
    NotDurableError,
    OverQuotaError,
    PutStateError,
)
from tests.cluster.clock import Clock
from tests.sample_chunk import SampleChunk, sample_chunk

MEMORY = 1 << 20
DISK = 16 << 20
SEGMENT = 1 << 20
BLOCK = 4 << 10
FRAME = 6000  # chunks of about 70 KB: fourteen fit into memory


Opener = Callable[..., Any]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def opened(tmp_path: Path, clock: Clock) -> Iterator[Opener]:
    """Opens the node on the same disk; the one opened before is given up without a farewell."""
    nodes: list[tuple[StorageNode, SegmentStore]] = []

    def start(
        *,
        disk_bytes: int = DISK,
        policy: str = "lru",
        durability: Durability = Durability.RELAXED,
        experiments: bool = False,
    ) -> StorageNode:
        if nodes:
            nodes[-1][1].close()
        store_type, node_type = (SlowStore, SlowNode) if experiments else (SegmentStore, StorageNode)
        store = store_type(tmp_path / "disk", disk_bytes, segment_bytes=SEGMENT)
        node = node_type(
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
    return (
        node.lookup(LookupRequest([chunk.chunk_id], [chunk.encoding], peek=True)).answers[0].encoding
        is not None
    )


def test_what_does_not_fit_into_memory_is_on_disk(opened: Opener) -> None:
    node = opened()
    chunks = [chunk_of(number) for number in range(40)]
    for chunk in chunks:
        assert put(node, chunk)
    stats = node.stats()
    assert (stats.chunks, stats.gauges["disk_chunks"], stats.counters["evictions"]) == (40, 40, 0)
    assert stats.counters["demotions"] == 40 - stats.gauges["memory_chunks"] > 0
    answers = node.lookup(LookupRequest([chunk.chunk_id for chunk in chunks], ["exact-zstd"])).answers
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
    (answer,) = node.lookup(LookupRequest([first.chunk_id], [first.encoding])).answers
    assert not answer.on_disk


def test_what_is_on_a_slow_disk_is_only_there(opened: Opener) -> None:
    node = opened(experiments=True)
    first, second, memory_only = chunk_of(0), chunk_of(1), chunk_of(2)
    put(node, first)
    put(node, memory_only, durability=Durability.MEMORY)
    with node.open(first.chunk_id, first.encoding) as reader:
        node.limit_disk(100e6)
        assert node.stats().gauges["memory_chunks"] == 2  # it is being read
        assert b"".join(view for piece in reader.pieces(0, 0, 10_000) for view in piece) == first.data
    put(node, second)
    while node.maintain():
        pass
    assert node.stats().gauges["memory_chunks"] == 0
    for _ in range(2):
        for chunk in (first, second, memory_only):
            assert read(node, chunk) == chunk.data
            assert (
                node.lookup(LookupRequest([chunk.chunk_id], [chunk.encoding], peek=True)).answers[0].on_disk
            )
    assert node.stats().counters["promotions"] == 0
    assert node.stats().gauges["disk_throttle_Bps"] == 100_000_000
    node.check_integrity()

    node.limit_disk(None)
    assert read(node, first) == first.data
    assert node.stats().counters["promotions"] == 1
    assert "disk_throttle_Bps" not in node.stats().gauges


def test_a_node_without_a_disk_has_no_slow_one() -> None:
    node = SlowNode("node-0", Arena(MEMORY, BLOCK))
    node.limit_disk(None)
    with pytest.raises(ConfigurationError, match="node-0 has no disk"):
        node.limit_disk(100e6)


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
    while node.maintain():  # what the disk refused for a moment is written back
        pass
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
    lease = node.lookup(LookupRequest([variant.chunk_id for variant in mine], ["exact-zstd"], lease_s=60.0))
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


@pytest.mark.parametrize("damaged", [(), (0,), (1,), (0, 2), (1, 2), (0, 1, 2)])
def test_encodings_that_the_disk_has_lost_are_left_out_of_an_answer(
    opened: Opener, tmp_path: Path, damaged: tuple[int, ...]
) -> None:
    node = opened()
    variants = [chunk_of(0, name) for name in ("exact-zstd", "medium-raw", "low-zstd")]
    for variant in variants:
        put(node, variant)
    node = opened()
    for segment in (tmp_path / "disk").glob("*.kvs"):
        data = bytearray(segment.read_bytes())
        for number in damaged:
            header = variants[number].data[: variants[number].header.header_bytes]
            position = data.find(header)
            if position >= 0:
                data[position + len(header) - 1] ^= 1
        segment.write_bytes(data)
    names = [variant.encoding for variant in variants]
    (answer,) = node.lookup(LookupRequest([variants[0].chunk_id], names, all_encodings=True)).answers
    found = [(answer.encoding, answer.header, answer.size_bytes)] if answer.encoding else []
    found += [(other.encoding, other.header, other.size_bytes) for other in answer.others]
    assert found == [
        (variant.encoding, variant.data[: variant.header.header_bytes], len(variant.data))
        for number, variant in enumerate(variants)
        if number not in damaged
    ]
    assert node.stats().counters["damaged"] == len(damaged)


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


def variant_of(chunk: SampleChunk, frame_bytes: int) -> SampleChunk:
    """Another worker's KV of the same text: never bit-equal."""
    frames = [bytes([number]) * frame_bytes for number in range(chunk.header.geometry.frame_count)]
    header, data = write_header(
        bytes(32), chunk.chunk_id, chunk.header.encoding, chunk.header.geometry, frames
    )
    return SampleChunk(chunk.chunk_id, chunk.encoding, header, b"".join([data, *frames]))


@pytest.mark.parametrize("frame_bytes", [3000, 15000])
def test_of_two_workers_bytes_one_is_kept_whole(opened: Opener, frame_bytes: int) -> None:
    node = opened()
    first = chunk_of(0)
    second = variant_of(first, frame_bytes)
    slow = node.begin_put(second.chunk_id, second.encoding, len(second.data))
    assert slow is not None
    slow.write(second.data)
    put(node, first, durability=Durability.MEMORY)
    assert slow.commit()  # it survives, the other one did not
    for number in range(1, 30):
        put(node, chunk_of(number))
    assert read(node, first) == second.data
    node.check_integrity()
    assert read(opened(), first) == second.data


def test_what_is_put_while_a_deletion_is_written_stays(
    opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = opened()
    chunk = chunk_of(0)
    put(node, chunk)
    forget = SegmentStore.forget

    def late(store: SegmentStore, meta: object, sequence: int) -> None:
        assert put(node, chunk, durability=Durability.DURABLE)
        forget(store, meta, sequence)

    monkeypatch.setattr(SegmentStore, "forget", late)
    assert node.delete([chunk.chunk_id]) == 1
    monkeypatch.undo()
    assert read(opened(), chunk) == chunk.data


def test_damage_in_memory_leaves_the_copy_on_disk(opened: Opener) -> None:
    node = opened()
    chunk = chunk_of(0)
    pending = node.begin_put(chunk.chunk_id, chunk.encoding, len(chunk.data))
    assert pending is not None
    views = list(pending.views())
    pending.write(chunk.data)
    pending.commit()
    views[-1][len(views[-1]) - 1] ^= 1
    assert "in memory" in (node.verify(chunk.chunk_id, chunk.encoding) or "")
    assert read(node, chunk) == chunk.data
    assert node.verify(chunk.chunk_id, chunk.encoding) is None
    node.check_integrity()


def damage(folder: Path, data: bytes) -> None:
    for segment in folder.glob("*.kvs"):
        content = bytearray(segment.read_bytes())
        if (position := content.find(data)) >= 0:
            content[position + len(data) // 2] ^= 1
            segment.write_bytes(content)
            return
    raise AssertionError("it is on no disk")


def test_damage_on_disk_is_written_anew_from_memory(opened: Opener, tmp_path: Path) -> None:
    node = opened()
    chunk = chunk_of(0)
    put(node, chunk)
    damage(tmp_path / "disk", chunk.data[5000:5100])
    assert "damaged" in (node.verify(chunk.chunk_id, chunk.encoding) or "")
    while node.maintain():
        pass
    assert read(opened(), chunk) == chunk.data


@pytest.mark.parametrize("where", [slice(40, 60), slice(20_000, 20_100)], ids=["header", "frame"])
def test_damage_is_noticed_by_small_reads_and_can_be_put_right(
    opened: Opener, tmp_path: Path, where: slice
) -> None:
    node = opened()
    chunk = chunk_of(0)
    put(node, chunk)
    node = opened()
    damage(tmp_path / "disk", chunk.data[where])
    frames = range(chunk.header.geometry.frame_count)
    with pytest.raises(ChunkNotFoundError, match="damaged"):
        b"".join(read(node, chunk, frame, 1) for frame in frames)
    assert not stored(node, chunk)
    assert put(node, chunk)
    assert read(node, chunk) == chunk.data


def test_a_tenants_name_has_a_limit(opened: Opener) -> None:
    node = opened()
    with pytest.raises(PutStateError, match="more than 255 bytes"):
        put(node, chunk_of(0), tenant="x" * 256)
    assert put(node, chunk_of(0), tenant="x" * 255)
    assert node.stats().counters["put_rejected"] == 1


def test_tiny_chunks_make_room_for_a_large_one(opened: Opener) -> None:
    node = opened(disk_bytes=4 << 20)
    for number in range(800):
        put(node, sample_chunk(content=number, frame_bytes=10))
    large = sample_chunk(content=9999, frame_bytes=60_000)
    assert put(node, large, durability=Durability.DURABLE)
    assert read(node, large) == large.data


def test_a_chunk_put_to_stay_outlives_the_ttl_of_before(opened: Opener, clock: Clock) -> None:
    node = opened()
    chunk = chunk_of(0)
    put(node, chunk, ttl_s=5.0)
    assert not put(node, chunk, ttl_s=6.0)  # about as long
    assert put(node, chunk)
    clock.now_s += 100
    assert stored(node, chunk)


def test_puts_under_way_count_against_a_quota_and_a_refused_put_evicts_nothing(opened: Opener) -> None:
    node = opened()
    chunks = [chunk_of(number) for number in range(5)]
    node.set_quotas({"acme": 3 * 100_000})
    options = PutOptions(tenant="acme")
    pending = [
        node.begin_put(chunk.chunk_id, chunk.encoding, 100_000, options=options) for chunk in chunks[:3]
    ]
    with pytest.raises(OverQuotaError):
        node.begin_put(chunks[3].chunk_id, chunks[3].encoding, 100_000, options=options)
    for put_ in pending:
        assert put_ is not None
        put_.revoke()
    assert put(node, chunks[0], tenant="acme")
    with pytest.raises(OverQuotaError):
        node.begin_put(chunks[1].chunk_id, chunks[1].encoding, 400_000, options=options)
    assert stored(node, chunks[0])


def test_a_lease_ends_with_its_chunk(opened: Opener) -> None:
    node = opened()
    chunk = chunk_of(0)
    put(node, chunk)
    lease = node.lookup(LookupRequest([chunk.chunk_id], [chunk.encoding], lease_s=60.0))
    node.delete([chunk.chunk_id])
    node.set_quotas({"acme": 100_000})
    put(node, chunk_of(1), tenant="acme")
    assert put(node, chunk_of(2), tenant="acme")  # evicts the other: nobody has it leased
    assert lease.lease_id is not None
    assert node.release_lease(lease.lease_id)
    node.maintain()
    node.check_integrity()


def test_damage_that_compaction_finds_is_dropped(opened: Opener, tmp_path: Path) -> None:
    node = opened()
    chunks = [chunk_of(number) for number in range(60)]
    for chunk in chunks:
        put(node, chunk)
    node = opened()
    damage(tmp_path / "disk", chunks[0].data[5000:5100])
    for chunk in chunks[1:50]:
        node.delete([chunk.chunk_id])
    while node.maintain():
        pass
    assert not stored(node, chunks[0])
    assert node.stats().counters["damaged"] == 1
    assert all(read(node, chunk) == chunk.data for chunk in chunks[50:])
