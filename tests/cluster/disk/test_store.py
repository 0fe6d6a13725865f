"""What a store promises while nothing goes wrong."""

import mmap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest

from kvstore_cluster.disk import RecordMeta, SegmentStore
from kvstore_codec.errors import (
    ChunkNotFoundError,
    ChunkTooLargeError,
    ConfigurationError,
    DiskError,
    DiskFullError,
    FolderInUseError,
    StorageError,
)
from tests.cluster.disk.chunks import append, by_key, contents, meta_of, read, tiny
from tests.sample_chunk import sample_chunk

LIMIT = 64 << 20


@pytest.fixture(params=[True, False], ids=["direct", "buffered"])
def direct(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def store(tmp_path: Path, direct: bool) -> Iterator[SegmentStore]:
    store = SegmentStore(tmp_path / "store", LIMIT, segment_bytes=1 << 20, direct=direct)
    store.recover()
    yield store
    store.check_integrity()
    store.close()


def reopened(store: SegmentStore, tmp_path: Path) -> SegmentStore:
    store.close()
    return SegmentStore(tmp_path / "store", LIMIT, segment_bytes=1 << 20, direct=store.direct)


def test_what_was_appended_is_read(store: SegmentStore) -> None:
    chunk = sample_chunk(frame_bytes=5000)
    location = append(store, chunk)
    assert read(store, location, len(chunk.data)) == chunk.data
    assert store.live_bytes == 4096 + -(-len(chunk.data) // 4096) * 4096
    assert store.used_bytes >= store.live_bytes


@pytest.mark.parametrize("offset", [0, 1, 511, 4095, 4096, 4097, 8192, 20000])
@pytest.mark.parametrize("length", [0, 1, 4095, 4096, 4097, 12288, 30001])
def test_any_part_is_read(store: SegmentStore, offset: int, length: int) -> None:
    chunk = sample_chunk(frame_bytes=5000)
    location = append(store, chunk)
    assert read(store, location, length, offset) == chunk.data[offset : offset + length]


@pytest.mark.parametrize("cuts", [[4096, 65536], [4096, 5000], [100, 4196, 8192], [65536], []])
def test_scattered_memory_is_written_and_read(store: SegmentStore, cuts: list[int]) -> None:
    """Page-aligned or not, in pieces of any size."""
    chunk = sample_chunk(frame_bytes=12000)
    size = len(chunk.data)
    assert size > 65536
    bounds = [0, *cuts, size]
    memory = memoryview(mmap.mmap(-1, 4 << 20))
    views = []
    for number, (start, end) in enumerate(pairwise(bounds)):
        view = memory[number << 19 :][: end - start]
        view[:] = chunk.data[start:end]
        views.append(view)
    location = store.append(meta_of(chunk), views, sync=False)
    assert read(store, location, size) == chunk.data
    for view in views:
        view[:] = bytes(len(view))
    store.read(location, 0, views)
    assert b"".join(views) == chunk.data


def test_large_chunks_in_many_small_runs(store: SegmentStore) -> None:
    """More views than one system call takes, and a chunk larger than a segment."""
    chunk = sample_chunk(frame_bytes=1 << 20)
    data = memoryview(chunk.data)
    views = [data[start : start + 1500] for start in range(0, len(data), 1500)]
    assert len(views) > 2048
    location = store.append(meta_of(chunk), views, sync=True)
    target = [memoryview(bytearray(1500)) for _ in views[:-1]]
    store.read(location, 0, target)
    assert b"".join(target) == data[: 1500 * len(target)]


def test_everything_is_there_after_a_restart(store: SegmentStore, tmp_path: Path) -> None:
    chunks = [sample_chunk(content=content, frame_bytes=20000) for content in range(60)]
    for chunk in chunks:
        append(store, chunk, sync=False)
    again = reopened(store, tmp_path)
    recovery = again.recover()
    found = {
        (meta.chunk_id.content_id, meta.encoding): read(again, location, meta.size_bytes)
        for meta, location in recovery.records
    }
    assert found == by_key(chunks)
    assert recovery.dropped == ()
    again.check_integrity()
    again.close()


def test_what_is_known_of_a_chunk_survives(store: SegmentStore, tmp_path: Path) -> None:
    chunk = tiny(1)
    meta = RecordMeta(
        chunk.chunk_id,
        chunk.encoding,
        len(chunk.data),
        chunk.header.header_bytes,
        calibration=b"c" * 32,
        tenant="Zoë",
        cost=256.5,
        expires_at_s=1e10,
    )
    location = store.append(meta, [memoryview(chunk.data)], sync=True)
    again = reopened(store, tmp_path)
    assert list(again.recover().records) == [(meta, location)]
    again.close()


def test_deleted_chunks_are_not_read(store: SegmentStore) -> None:
    location = append(store, tiny(1))
    store.delete(location)
    store.delete(location)
    assert store.live_bytes == 0
    with pytest.raises(ChunkNotFoundError):
        read(store, location, 10)


def test_a_forgotten_chunk_stays_away_and_an_evicted_one_may_come_back(
    store: SegmentStore, tmp_path: Path
) -> None:
    kept, evicted, forgotten = tiny(1), tiny(2), tiny(3)
    append(store, kept)
    store.delete(append(store, evicted))
    append(store, tiny(3, version=1))
    store.delete(append(store, forgotten))
    store.forget(meta_of(forgotten), store.newest_sequence)
    again = reopened(store, tmp_path)
    found = contents(again)
    assert found == by_key([kept, evicted])
    again.close()


def test_the_newest_put_wins(store: SegmentStore, tmp_path: Path) -> None:
    old = append(store, tiny(1))
    append(store, tiny(1, version=1))
    store.delete(old)
    again = reopened(store, tmp_path)
    assert contents(again) == by_key([tiny(1, version=1)])
    again.close()


def test_a_put_after_a_deletion_is_kept(store: SegmentStore, tmp_path: Path) -> None:
    store.delete(append(store, tiny(1)))
    store.forget(meta_of(tiny(1)), store.newest_sequence)
    append(store, tiny(1, version=1))
    again = reopened(store, tmp_path)
    assert contents(again) == by_key([tiny(1, version=1)])
    again.close()


def test_a_put_before_the_tombstone_of_an_older_deletion_is_kept(store: SegmentStore, tmp_path: Path) -> None:
    store.delete(append(store, tiny(1)))
    deleted_up_to = store.newest_sequence
    append(store, tiny(1, version=1))
    store.forget(meta_of(tiny(1)), deleted_up_to)
    again = reopened(store, tmp_path)
    assert contents(again) == by_key([tiny(1, version=1)])
    again.close()


def test_a_chunk_that_is_gone_already_can_be_forgotten(store: SegmentStore, tmp_path: Path) -> None:
    store.forget(meta_of(tiny(7)), store.newest_sequence)
    store.delete(append(store, tiny(1)))
    store.forget(meta_of(tiny(1)), store.newest_sequence)
    again = reopened(store, tmp_path)
    assert contents(again) == {}
    again.close()


def test_ten_thousand_tiny_chunks(store: SegmentStore, tmp_path: Path) -> None:
    again = SegmentStore(tmp_path / "many", 1 << 30, direct=store.direct)
    again.recover()
    chunk = tiny(0)
    metas = [
        meta_of(sample_chunk(content, frame_bytes=1, geometry=chunk.header.geometry))
        for content in range(100)
    ]
    for number in range(10_000):
        meta = metas[number % 100]
        again.append(meta, [memoryview(bytes(meta.size_bytes))], sync=False)
    assert again.used_bytes < 10_000 * (8192 + 150)  # an index of 140 bytes a record
    assert again.live_bytes == 10_000 * 8192
    again.close()


def test_a_full_store_says_so_and_takes_more_after_compaction(store: SegmentStore) -> None:
    chunk = sample_chunk(frame_bytes=200_000)
    locations = []

    def fill() -> None:
        while True:
            locations.append(append(store, chunk, sync=False))

    with pytest.raises(DiskFullError, match="do not fit"):
        fill()
    assert store.used_bytes <= LIMIT
    assert store.live_bytes > store.capacity_bytes
    for location in locations[::3]:
        store.delete(location)
    assert store.live_bytes < store.capacity_bytes
    moved = dict.fromkeys(locations)
    while store.compact(lambda old, new: moved.update({old: new}) is None):
        pass
    append(store, chunk, sync=True)
    assert store.used_bytes <= LIMIT


def test_a_chunk_larger_than_the_store_is_refused(store: SegmentStore) -> None:
    chunk = tiny(1)
    meta = RecordMeta(chunk.chunk_id, chunk.encoding, LIMIT, 10)
    memory = memoryview(bytes(1 << 20))
    with pytest.raises(ChunkTooLargeError):
        store.append(meta, [memory] * 64, sync=False)


def test_sizes_that_do_not_fit_are_refused(store: SegmentStore) -> None:
    chunk = tiny(1)
    with pytest.raises(StorageError, match=r"was announced with a size of [0-9]+ bytes, but has "):
        store.append(meta_of(chunk), [memoryview(chunk.data)[1:]], sync=False)
    location = append(store, chunk)
    with pytest.raises(StorageError, match="outside"):
        read(store, location, 4097)
    with pytest.raises(StorageError, match="tenant"):
        store.append(meta_of(chunk, tenant="t" * 5000), [memoryview(chunk.data)], sync=False)
    assert store.live_bytes == 8192


def test_a_folder_belongs_to_one_store(store: SegmentStore, tmp_path: Path) -> None:
    with pytest.raises(FolderInUseError, match="in use"):
        SegmentStore(tmp_path / "store", LIMIT)


def test_a_closed_store_says_so(tmp_path: Path) -> None:
    store = SegmentStore(tmp_path, LIMIT)
    store.recover()
    location = append(store, tiny(1))
    store.close()
    store.close()
    with pytest.raises(DiskError, match="closed"):
        append(store, tiny(2))
    with pytest.raises(DiskError, match="closed"):
        read(store, location, 1)


def test_a_store_that_was_not_recovered_says_so(tmp_path: Path) -> None:
    """It would write over what it does not know."""
    store = SegmentStore(tmp_path, LIMIT)
    with pytest.raises(DiskError, match="not recovered"):
        append(store, tiny(1))
    store.close()


def test_a_limit_too_low_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="too few"):
        SegmentStore(tmp_path, 64 << 10)


def test_many_threads_append_and_read(store: SegmentStore) -> None:
    def work(thread: int) -> None:
        for number in range(40):
            chunk = tiny(thread * 1000 + number)
            location = append(store, chunk, sync=number % 4 == 0)
            assert read(store, location, len(chunk.data)) == chunk.data

    with ThreadPoolExecutor(8) as executor:
        list(executor.map(work, range(8)))
    assert store.live_bytes == 8 * 40 * 8192
