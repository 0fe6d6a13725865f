"""A storage node with a disk: what is written through or back, moves between the tiers, and survives a restart."""

import pytest

from kvstore_cluster.arena import Arena
from kvstore_cluster.disk import SegmentStore
from kvstore_cluster.durability import Durability
from kvstore_cluster.lookup import LookupRequest
from kvstore_cluster.node import StorageNode
from kvstore_cluster.slow_disk import SlowNode
from kvstore_codec.chunk import write_header
from kvstore_codec.errors import (
    ArenaFullError,
    ConfigurationError,
    NotDurableError,
)
from tests.cluster.disk_node import BLOCK, MEMORY, Opener, chunk_of, put, read, stored
from tests.sample_chunk import SampleChunk, sample_chunk


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
    node.set_pins({"": {kept.chunk_id}})
    put(node, kept)
    for number in range(150):
        put(node, chunk_of(number))
    assert read(node, kept) == kept.data
    assert node.stats().gauges["pinned"] == 1
    node.set_pins({})
    for number in range(150, 300):
        put(node, chunk_of(number))
    assert not stored(node, kept)


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


def test_tiny_chunks_make_room_for_a_large_one(opened: Opener) -> None:
    node = opened(disk_bytes=4 << 20)
    for number in range(800):
        put(node, sample_chunk(content=number, frame_bytes=10))
    large = sample_chunk(content=9999, frame_bytes=60_000)
    assert put(node, large, durability=Durability.DURABLE)
    assert read(node, large) == large.data
