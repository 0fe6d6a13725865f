"""What compaction does with records that are damaged, or that their owner does not take."""

from pathlib import Path

import pytest

from kvstore_cluster.disk import Location, RecordMeta
from tests.cluster.disk.chunks import meta_of
from tests.cluster.disk.index import BLOCK, Index, compact, segments


def test_a_damaged_chunk_is_not_moved_and_keeps_its_segment(index: Index, tmp_path: Path) -> None:
    for content in range(15):
        index.put(content)
    index.put(99)
    location, chunk = index.where[3]
    with (tmp_path / "store" / "segment-00000001.kvs").open("r+b") as file:
        file.seek(location % (1 << 24) * BLOCK + BLOCK + len(chunk.data) - 1)
        file.write(bytes([chunk.data[-1] ^ 1]))
    for content in range(4, 15):
        index.delete(content)
    compact(index)
    assert "segment-00000001.kvs" in segments(tmp_path)
    assert index.where[3][0] == location
    index.delete(3)
    compact(index)
    assert "segment-00000001.kvs" not in segments(tmp_path)


def test_whose_chunk_is_damaged_is_told_and_its_segment_goes(index: Index, tmp_path: Path) -> None:
    for content in range(15):
        index.put(content)
    index.put(99)
    location, chunk = index.where[3]
    index.store.sync()
    with (tmp_path / "store" / "segment-00000001.kvs").open("r+b") as file:
        file.seek(location % (1 << 24) * BLOCK + BLOCK + len(chunk.data) - 1)
        file.write(bytes([chunk.data[-1] ^ 1]))
    for content in range(4, 15):
        index.delete(content)
    told: list[tuple[RecordMeta, Location]] = []

    def lost(meta: RecordMeta, location: Location) -> None:
        told.append((meta, location))
        index.delete(3)

    while index.store.compact(index.relocate, lost):
        pass
    assert told == [(meta_of(chunk), location)]
    assert "segment-00000001.kvs" not in segments(tmp_path)


def test_a_chunk_whose_header_alone_is_damaged_is_moved(index: Index, tmp_path: Path) -> None:
    for content in range(15):
        index.put(content)
    index.put(99)
    location, _ = index.where[3]
    with (tmp_path / "store" / "segment-00000001.kvs").open("r+b") as file:
        file.seek(location % (1 << 24) * BLOCK)
        file.write(bytes(BLOCK))
    for content in range(4, 15):
        index.delete(content)
    compact(index)
    assert index.where[3][0] != location
    assert "segment-00000001.kvs" not in segments(tmp_path)


def test_a_copy_that_its_owner_fails_to_take_is_dead(index: Index, tmp_path: Path) -> None:
    for content in range(16):
        index.put(content)
    for content in range(9):
        index.delete(content)
    live_bytes = index.store.live_bytes

    def fail(meta: RecordMeta, old: Location, new: Location) -> bool:
        raise RuntimeError("the index is closed")

    for _ in range(3):
        with pytest.raises(RuntimeError, match="the index is closed"):
            index.store.compact(fail)
        assert index.store.live_bytes == live_bytes
    compact(index)
    assert "segment-00000001.kvs" not in segments(tmp_path)
