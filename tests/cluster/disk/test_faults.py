"""Disks that fail, fill up or turn read-only."""

import errno
import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kvstore_cluster.disk import Location, RecordMeta, SegmentStore
from kvstore_cluster.disk.file import SegmentFile
from kvstore_codec.errors import DiskError, DiskFailedError, DiskFullError, DiskReadOnlyError
from tests.cluster.disk.chunks import append, by_key, contents, read, tiny
from tests.cluster.disk.index import Index, after_restart, compact, opened, segments

LIMIT = 64 << 20
PERIOD_S = 0.02


class Faults:
    """Which operations on files fail, and with what."""

    def __init__(self) -> None:
        self.syncing: int | None = None
        self.writing: int | None = None
        self.reading: int | None = None
        self.slow_sync_s = 0.0
        self.syncs = 0

    def open_file(self, path: Path, *, create: bool, direct: bool) -> SegmentFile:
        faults = self

        class FaultyFile(SegmentFile):
            def write(self, offset: int, views: Sequence[memoryview]) -> None:
                _fail(faults.writing)
                super().write(offset, views)

            def read(self, offset: int, views: Sequence[memoryview]) -> None:
                _fail(faults.reading)
                super().read(offset, views)

            def sync(self) -> None:
                faults.syncs += 1
                time.sleep(faults.slow_sync_s)
                _fail(faults.syncing)
                super().sync()

        return FaultyFile(path, create=create, direct=direct)


def _fail(number: int | None) -> None:
    if number is not None:
        raise OSError(number, os.strerror(number))


@pytest.fixture
def faults() -> Faults:
    return Faults()


@pytest.fixture
def store(tmp_path: Path, faults: Faults) -> Iterator[SegmentStore]:
    store = SegmentStore(
        tmp_path / "store", LIMIT, segment_bytes=1 << 20, sync_period_s=PERIOD_S, open_file=faults.open_file
    )
    store.recover()
    yield store
    store.check_integrity()
    store.close()


def wait_until_well(store: SegmentStore) -> None:
    deadline = time.monotonic() + 30
    while store.error:
        assert time.monotonic() < deadline
        time.sleep(PERIOD_S / 2)


def test_after_a_failed_sync_nothing_is_durable_until_another_segment_syncs(
    store: SegmentStore, faults: Faults, tmp_path: Path
) -> None:
    before = append(store, tiny(1))
    faults.syncing = errno.EIO
    for _ in range(3):
        with pytest.raises(DiskFailedError, match="check that disk"):
            append(store, tiny(2))
    assert "segment" in store.error
    assert read(store, before, 100) == tiny(1).data[:100]
    faults.syncing = None
    wait_until_well(store)
    after = append(store, tiny(3))
    assert after >> 24 > before >> 24, "the failed segment takes nothing any more"
    store.close()
    again = SegmentStore(tmp_path / "store", LIMIT)
    found = contents(again)
    assert found.items() >= by_key([tiny(1), tiny(3)]).items()
    assert found.items() <= by_key([tiny(1), tiny(2), tiny(3)]).items(), (
        "2 was refused, but may have been written"
    )
    again.close()


def test_everybody_who_waits_for_a_failed_sync_is_told(store: SegmentStore, faults: Faults) -> None:
    append(store, tiny(0))
    faults.slow_sync_s, faults.syncing = 0.05, errno.EIO

    def outcome(content: int) -> type[BaseException] | None:
        try:
            append(store, tiny(content))
        except DiskError as error:
            return type(error)
        return None

    with ThreadPoolExecutor(6) as executor:
        outcomes = set(executor.map(outcome, range(1, 7)))
    assert outcomes == {DiskFailedError}
    assert store.live_bytes == 8192
    faults.slow_sync_s, faults.syncing = 0, None


def test_a_failed_segment_is_emptied_before_anything_is_removed(faults: Faults, tmp_path: Path) -> None:
    """What was copied into a segment that could not be synced is not safe there."""
    store = opened(tmp_path / "store", faults.open_file)
    store.recover()
    index = Index(store)
    for content in range(16):
        index.put(content, sync=True)
    for content in range(9):
        index.delete(content)

    def relocate(meta: RecordMeta, old: Location, new: Location) -> bool:
        faults.syncing = errno.EIO
        return index.relocate(meta, old, new)

    with pytest.raises(DiskFailedError):
        store.compact(relocate)
    for _ in range(3):
        with pytest.raises(DiskFailedError):
            store.compact(index.relocate)
        assert segments(tmp_path)[0] == "segment-00000001.kvs"
    index.check()
    faults.syncing = None
    wait_until_well(store)
    compact(index)
    assert segments(tmp_path)[0] > "segment-00000002.kvs"
    index.check()
    assert after_restart(index, tmp_path) == by_key(index.chunks)
    store.close()


def test_a_failed_segment_without_live_records_does_not_stop_one_with_some(
    faults: Faults, tmp_path: Path
) -> None:
    store = opened(tmp_path / "store", faults.open_file)
    store.recover()
    index = Index(store)
    for first in (0, 100):
        for content in range(first, first + 5):
            index.put(content, sync=True)
        faults.syncing = errno.EIO
        with pytest.raises(DiskFailedError):
            index.put(first + 99, sync=True)
        faults.syncing = None
        wait_until_well(store)
    for content in range(5):
        index.delete(content)
    compact(index)
    assert segments(tmp_path)[0] > "segment-00000002.kvs"
    assert after_restart(index, tmp_path) == by_key(index.chunks)
    store.close()


def test_unsynced_puts_are_synced_within_the_period(store: SegmentStore, faults: Faults) -> None:
    append(store, tiny(1), sync=False)
    begun = faults.syncs
    deadline = time.monotonic() + 30
    append(store, tiny(2), sync=False)
    while faults.syncs == begun:
        assert time.monotonic() < deadline
        time.sleep(PERIOD_S)


def test_concurrent_syncs_share_one(store: SegmentStore, faults: Faults) -> None:
    append(store, tiny(0))
    faults.slow_sync_s = 0.03
    before = faults.syncs
    barrier = threading.Barrier(16)

    def put(content: int) -> None:
        barrier.wait()
        append(store, tiny(content))

    with ThreadPoolExecutor(16) as executor:
        list(executor.map(put, range(1, 17)))
    assert faults.syncs - before <= 8
    faults.slow_sync_s = 0


def test_a_disk_that_turns_read_only_still_serves(store: SegmentStore, faults: Faults) -> None:
    location = append(store, tiny(1))
    faults.writing = errno.EROFS
    for _ in range(2):
        with pytest.raises(DiskReadOnlyError, match="make it writable"):
            append(store, tiny(2))
    assert "Read-only" in store.error
    assert read(store, location, len(tiny(1).data)) == tiny(1).data
    faults.writing = None
    wait_until_well(store)
    append(store, tiny(2))


def test_what_cannot_be_read_is_an_error_and_no_chunk(store: SegmentStore, faults: Faults) -> None:
    location = append(store, tiny(1))
    faults.reading = errno.EIO
    with pytest.raises(DiskFailedError, match="reading segment 1"):
        read(store, location, 10)
    faults.reading = None
    assert read(store, location, 10) == tiny(1).data[:10]


def test_a_failed_write_leaves_no_trace(store: SegmentStore, faults: Faults) -> None:
    append(store, tiny(1))
    faults.writing = errno.ENOSPC
    used_bytes = store.used_bytes
    for _ in range(20):
        with pytest.raises(DiskFullError):
            append(store, tiny(2))
    assert store.used_bytes == used_bytes
    faults.writing = None
    location = append(store, tiny(2))
    assert read(store, location, len(tiny(2).data)) == tiny(2).data
