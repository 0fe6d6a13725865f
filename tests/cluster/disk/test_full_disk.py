"""Disks with less room than there should be, and disks of other kinds."""

import errno
import os
import random
import resource
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvstore_cluster.disk import SegmentStore
from kvstore_cluster.disk.file import SegmentFile
from kvstore_cluster.disk.forgotten import ForgottenRecords
from kvstore_cluster.forgotten import Forgotten
from kvstore_codec.errors import DiskFullError, DiskReadOnlyError
from tests.cluster.disk.chunks import append, by_key, contents, meta_of, read, tiny
from tests.cluster.disk.index import SEGMENT, Index, compact, opened
from tests.cluster.encryption.stores import NEW, OLD, keys_of, name_of
from tests.sample_chunk import sample_chunk

LIMIT = 64 << 20
PERIOD_S = 0.02


@contextmanager
def mounted(folder: Path, kind: str, options: str) -> Iterator[Path]:
    """A file system of its own, where the tests may make one."""
    folder.mkdir()
    mount = subprocess.run(
        ["mount", "-t", kind, "-o", options, kind, str(folder)],  # noqa: S607
        capture_output=True,
        text=True,
        check=False,
    )
    if mount.returncode:
        pytest.skip(f"no {kind} can be mounted here: {mount.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)  # noqa: S607


def until_full(put: Callable[[int], object]) -> None:
    content = 0
    try:
        while True:
            put(content)
            content += 1
    except DiskFullError:
        return


def test_a_really_full_disk(tmp_path: Path) -> None:
    with mounted(tmp_path / "small", "tmpfs", "size=6m") as folder:
        store = SegmentStore(folder / "store", LIMIT, segment_bytes=1 << 20, sync_period_s=PERIOD_S)
        store.recover()
        chunks = []

        def fill() -> None:
            while True:
                chunk = sample_chunk(len(chunks), frame_bytes=20_000)
                locations.append(append(store, chunk))
                chunks.append(chunk)

        locations: list[int] = []
        with pytest.raises(DiskFullError, match="free space"):
            fill()
        assert store.error == ""
        assert len(chunks) > 5
        store.check_integrity()
        store.close()
        again = SegmentStore(folder / "store", LIMIT)
        assert contents(again) == by_key(chunks)
        with pytest.raises(DiskFullError):
            append(again, sample_chunk(1000, frame_bytes=200_000))
        again.check_integrity()
        again.close()


def test_a_disk_that_is_smaller_than_the_limit_is_used_as_far_as_it_goes(tmp_path: Path) -> None:
    """Whoever keeps to the capacity is not refused, although chunks go in another order than they came."""
    generator = random.Random(1)
    with mounted(tmp_path / "small", "tmpfs", "size=2m") as folder:
        store = opened(folder / "store")
        store.recover()
        index = Index(store)
        for content in range(800):
            while store.live_bytes + 2 * 4096 > store.capacity_bytes:
                index.delete(generator.choice(list(index.where)))
            try:
                index.put(content)
            except DiskFullError:
                compact(index)
                index.put(content)
        assert len(index.where) > 100
        index.check()
        store.close()


def test_a_disk_that_takes_less_than_it_has_free_asks_for_deletions(tmp_path: Path) -> None:
    """As where a quota holds."""
    full = False

    class File(SegmentFile):
        def write(self, offset: int, views: Sequence[memoryview]) -> None:
            if full:
                raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
            super().write(offset, views)

    store = opened(tmp_path / "store", File, sync_period_s=0.2)
    store.recover()
    for content in range(40):
        append(store, tiny(content), sync=False)
    capacity_bytes = store.capacity_bytes
    full = True

    def asks() -> bool:
        with pytest.raises(DiskFullError):
            append(store, tiny(99))
        return store.capacity_bytes < store.live_bytes

    assert any(asks() for _ in range(10)), "it may be measured between the two"
    full = False
    deadline = time.monotonic() + 30
    while store.capacity_bytes < capacity_bytes:
        assert time.monotonic() < deadline
        time.sleep(PERIOD_S)
    store.close()


def test_a_store_shrinks_to_a_lower_limit(tmp_path: Path) -> None:
    store = opened(tmp_path / "store")
    store.recover()
    index = Index(store)
    for content in range(400):
        index.put(content)
    store.close()
    limit_bytes = 2 << 20
    store = index.store = SegmentStore(tmp_path / "store", limit_bytes, segment_bytes=SEGMENT)
    index.where = {}
    ids = {tiny(content).chunk_id: content for content in range(400)}
    for meta, location in store.recover().records:
        content = ids[meta.chunk_id]
        index.where[content] = (location, tiny(content))
    assert len(index.where) == 400
    for content in random.Random(1).sample(range(400), 240):
        index.delete(content)
    assert store.live_bytes <= store.capacity_bytes
    compact(index)
    index.put(1000, sync=True)
    assert store.used_bytes <= limit_bytes
    index.check()
    store.close()


def test_deletions_that_fill_the_room_puts_leave_do_not_stop_compaction(tmp_path: Path) -> None:
    store = opened(tmp_path / "store")
    store.recover()
    index = Index(store)
    until_full(index.put)
    for content in range(0, max(index.where), 2):
        index.delete(content)
    until_full(lambda content: store.forget(meta_of(tiny(2 * content)), store.newest_sequence))
    compact(index)
    index.put(5000)
    assert store.used_bytes < store.limit_bytes
    index.check()
    store.close()


def test_a_file_that_may_not_grow(tmp_path: Path) -> None:
    store = SegmentStore(tmp_path, LIMIT)
    store.recover()
    location = append(store, tiny(1))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16384, hard))
    try:
        with pytest.raises(DiskFullError):
            append(store, sample_chunk(2, frame_bytes=20_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert read(store, location, 10) == tiny(1).data[:10]
    append(store, sample_chunk(2, frame_bytes=20_000))
    store.check_integrity()
    store.close()


def test_a_read_only_folder_is_refused(tmp_path: Path) -> None:
    with (
        mounted(tmp_path / "fixed", "tmpfs", "ro,size=1m") as folder,
        pytest.raises(DiskReadOnlyError, match="Read-only"),
    ):
        SegmentStore(folder, LIMIT)


def test_a_file_system_without_direct_io(tmp_path: Path) -> None:
    with mounted(tmp_path / "ram", "ramfs", "mode=755") as folder:
        store = SegmentStore(folder, LIMIT)
        store.recover()
        assert not store.direct
        location = append(store, tiny(1))
        assert read(store, location, len(tiny(1).data)) == tiny(1).data
        store.close()


def test_a_change_of_keys_on_a_full_disk_does_not_stop_compaction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although the forgotten tenants cannot be encrypted with the new key yet."""
    monkeypatch.setattr("kvstore_cluster.disk.store.FULL_PAUSE_S", 0.0)
    secrets = [OLD]
    store = SegmentStore(tmp_path, 4 << 20, segment_bytes=SEGMENT, keys=lambda: keys_of(*secrets))
    store.recover()
    index = Index(store)
    for content in range(40):
        index.put(content)
    store.keep_forgotten(ForgottenRecords().with_applied(Forgotten({"tenant": 1}), ["tenant"], 0))
    for content in range(40):
        index.delete(content)
    secrets.insert(0, NEW)
    (tmp_path / "forgotten.tmp").symlink_to("/dev/full")
    used_bytes = store.used_bytes
    compact(index)
    assert store.used_bytes < used_bytes
    assert name_of(OLD) in store.chunks_by_key
    (tmp_path / "forgotten.tmp").unlink()
    while name_of(OLD) in store.chunks_by_key:
        compact(index)
    store.close()
