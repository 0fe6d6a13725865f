"""Space comes back, nothing that lives is lost, nothing that was forgotten returns."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kvstore_cluster.disk import Location, RecordMeta
from kvstore_codec.errors import ChunkNotFoundError
from tests.cluster.disk.chunks import by_key, meta_of, read, tiny
from tests.cluster.disk.index import BLOCK, SEGMENT, Index, after_restart, compact, opened, segments


def test_space_comes_back(index: Index, tmp_path: Path) -> None:
    for content in range(150):
        index.put(content)
    used_bytes = index.store.used_bytes
    for content in range(150):
        if content % 5:
            index.delete(content)
    compact(index)
    assert index.store.used_bytes < used_bytes / 2
    on_disk = sum(path.stat().st_size for path in (tmp_path / "store").iterdir())
    assert on_disk <= index.store.used_bytes
    index.check()
    assert after_restart(index, tmp_path).items() >= by_key(index.chunks).items()


def test_segments_that_live_are_left_alone(index: Index, tmp_path: Path) -> None:
    for content in range(60):
        index.put(content)
    before = segments(tmp_path)
    index.delete(3)
    compact(index)
    assert segments(tmp_path) == before


def test_a_dead_segment_goes_without_copying(index: Index, tmp_path: Path) -> None:
    for content in range(45):
        index.put(content)
    for content in range(15):
        index.delete(content)
    compact(index)
    assert "segment-00000001.kvs" not in segments(tmp_path)
    assert not (tmp_path / "store" / "segment-00000001.index").exists()


@pytest.mark.parametrize("at", range(6))
def test_a_crash_in_the_middle(index: Index, tmp_path: Path, at: int) -> None:
    for content in range(15):
        index.put(content)
    index.put(99)
    for content in range(9):
        index.delete(content, forget=True)
    found = []

    def relocate(meta: RecordMeta, old: Location, new: Location) -> bool:
        if len(found) <= at:
            found.append(after_restart(index, tmp_path))
        return index.relocate(meta, old, new)

    index.store.compact(relocate)
    assert found
    assert all(state == by_key(index.chunks) for state in found)


def test_copies_do_not_overrule_newer_puts(index: Index, tmp_path: Path) -> None:
    for content in range(15):
        index.put(content)
    index.put(50)
    for content in range(10):
        index.delete(content)

    def relocate(meta: RecordMeta, old: Location, new: Location) -> bool:
        moved = index.relocate(meta, old, new)
        if index.where[12][0] == new:
            index.put(12, version=1)
        return moved

    index.store.compact(relocate)
    assert index.where[12][1] == tiny(12, version=1)
    assert after_restart(index, tmp_path)[tiny(12).chunk_id.content_id, tiny(12).encoding] == index.read(12)


def test_a_chunk_deleted_while_it_is_copied_stays_deleted(index: Index, tmp_path: Path) -> None:
    for content in range(15):
        index.put(content)
    for content in range(10):
        index.delete(content)
    late: list[Location] = []

    def relocate(meta: RecordMeta, old: Location, new: Location) -> bool:
        if not late:  # its owner has just taken it out of the index and will come to delete it
            (content,) = (content for content, (where, _) in index.where.items() if where == old)
            index.where.pop(content)
            late.append(old)
        return index.relocate(meta, old, new)

    index.put(99)  # so that the segment is not the active one
    index.store.compact(relocate)
    index.store.delete(late[0])
    index.store.forget(meta_of(tiny(10)), index.store.newest_sequence)
    compact(index)
    assert len(index.where) == 5
    assert after_restart(index, tmp_path).items() >= by_key(index.chunks).items()
    assert (tiny(10).chunk_id.content_id, tiny(10).encoding) not in after_restart(index, tmp_path)


def test_tombstones_stay_while_they_are_needed(index: Index, tmp_path: Path) -> None:
    """The segment with the tombstone is compacted, that with the dead chunk is not."""
    for content in range(14):
        index.put(content)
    index.put(77)  # lies dead among the living
    index.put(20)
    index.delete(77, forget=True)
    for content in range(21, 36):
        index.put(content)
    for content in range(20, 35):
        index.delete(content)
    compact(index)
    assert "segment-00000001.kvs" in segments(tmp_path)
    assert "segment-00000002.kvs" not in segments(tmp_path)
    assert (tiny(77).chunk_id.content_id, tiny(77).encoding) not in after_restart(index, tmp_path)


def test_tombstones_go_when_they_are_not_needed(index: Index, tmp_path: Path) -> None:
    for round_ in range(12):
        for content in range(30):
            index.put(content, round_)
        for content in range(30):
            index.delete(content, forget=True)
        compact(index)
    assert index.store.used_bytes < 4 * SEGMENT
    assert after_restart(index, tmp_path) == {}


def test_restarts_drop_tombstones_that_delete_nothing(tmp_path: Path) -> None:
    for _ in range(5):
        store = opened(tmp_path / "store")
        index = Index(store)
        store.recover()
        for content in range(20):
            index.put(content)
            index.delete(content, forget=True)
        compact(index)
        store.check_integrity()
        store.close()
    store = opened(tmp_path / "store")
    store.recover()
    compact(Index(store))
    assert store.live_bytes <= 20 * BLOCK
    store.close()


def test_readers_of_a_dropped_segment_are_told(index: Index) -> None:
    for content in range(16):
        index.put(content)
    old = [location for location, _ in index.where.values()]
    for content in range(9):
        index.delete(content)
    compact(index)
    with pytest.raises(ChunkNotFoundError):
        read(index.store, old[12], 10)


def test_closing_waits_for_a_compaction_that_stops(index: Index, tmp_path: Path) -> None:
    for content in range(16):
        index.put(content)
    for content in range(8):
        index.delete(content)
    begun = threading.Event()
    moved = []

    def relocate(meta: RecordMeta, old: Location, new: Location) -> bool:
        begun.set()
        time.sleep(0.05)
        moved.append(new)
        return index.relocate(meta, old, new)

    with ThreadPoolExecutor(1) as executor:
        compacting = executor.submit(index.store.compact, relocate)
        begun.wait(timeout=60)
        index.store.close()
        assert len(moved) == 1
        assert compacting.result() is False
    assert after_restart(index, tmp_path).items() >= by_key(index.chunks).items()
    index.where.clear()


def test_puts_reads_deletions_and_compaction_at_once(index: Index, tmp_path: Path) -> None:
    stop = threading.Event()

    def work(thread: int) -> None:
        for round_ in range(6):
            mine = range(thread * 100, thread * 100 + 25)
            for content in mine:
                index.put(content, round_, sync=content % 8 == 0)
            for content in mine:
                assert index.read(content) == tiny(content, round_).data
            for content in mine:
                if content % 3 and round_ < 5:
                    index.delete(content, forget=content % 2 == 0)

    def until_stopped(step: Callable[[], object]) -> None:
        while not stop.is_set():
            step()

    with ThreadPoolExecutor(5) as executor:
        compacting = executor.submit(until_stopped, lambda: index.store.compact(index.relocate))
        try:
            list(executor.map(work, range(4)))
        finally:
            stop.set()
        compacting.result()
    assert len(index.where) == 100
    compact(index)
    assert after_restart(index, tmp_path).items() >= by_key(index.chunks).items()
