"""A data folder that somebody removes, moves or takes while the store is in use."""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from kvstore_cluster.disk import SegmentStore
from kvstore_cluster.disk.file import SegmentFile
from kvstore_codec.errors import DiskError, DiskFailedError, FolderInUseError
from tests.cluster.disk.chunks import by_key
from tests.cluster.disk.index import Index, after_restart, compact, opened

QUIET_S = 3600.0


@pytest.fixture
def quiet(tmp_path: Path) -> Iterator[Index]:
    """A store whose upkeep does nothing by itself."""
    store = opened(tmp_path / "store", sync_period_s=QUIET_S)
    store.recover()
    index = Index(store)
    yield index
    index.check()
    store.close()


@contextmanager
def held_up(index: Index) -> Iterator[None]:
    """The store's upkeep does not look at its files meanwhile."""
    with index.store._table._removing:
        yield


def compact_until_well(index: Index) -> None:
    """Until the store is well, as the thread that maintains a node does it."""
    deadline = time.monotonic() + 30
    while index.store.error:
        assert time.monotonic() < deadline, index.store.error
        with suppress(DiskError):
            compact(index)
        time.sleep(0.02)


@pytest.mark.parametrize("sync", [False, True], ids=["relaxed", "durable"])
def test_a_put_after_the_removal_is_in_a_file_with_a_name(quiet: Index, tmp_path: Path, sync: bool) -> None:
    quiet.put(1, sync=sync)
    shutil.rmtree(tmp_path / "store")
    quiet.put(2, sync=sync)
    found = after_restart(quiet, tmp_path)
    assert found.items() >= by_key([quiet.where[2][1]]).items()


def test_what_was_there_is_read_meanwhile_and_written_again(quiet: Index, tmp_path: Path) -> None:
    for content in range(60):  # several segments, sealed ones too
        quiet.put(content, sync=True)
    shutil.rmtree(tmp_path / "store")
    quiet.put(60, sync=True)
    quiet.check()
    assert "bytes of chunks in them are still to be written again" in quiet.store.error
    compact(quiet)
    assert quiet.store.error == ""
    quiet.check()
    assert after_restart(quiet, tmp_path) == by_key(quiet.chunks)


def test_it_is_noticed_without_a_put(index: Index, tmp_path: Path) -> None:
    for content in range(40):
        index.put(content, sync=True)
    shutil.rmtree(tmp_path / "store")
    deadline = time.monotonic() + 30
    while not (tmp_path / "store").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    compact_until_well(index)
    assert after_restart(index, tmp_path) == by_key(index.chunks)


def test_a_removed_file_alone_is_noticed(quiet: Index, tmp_path: Path) -> None:
    for content in range(40):
        quiet.put(content, sync=True)
    first, *others = sorted((tmp_path / "store").glob("*.kvs"))
    assert others
    first.unlink()
    with pytest.raises(DiskError):  # not everything that was put would survive
        quiet.store.sync()
    compact(quiet)
    quiet.store.sync()
    assert after_restart(quiet, tmp_path) == by_key(quiet.chunks)


def test_a_folder_that_was_moved_away_is_left_alone(quiet: Index, tmp_path: Path) -> None:
    quiet.put(1, sync=True)
    (tmp_path / "store").rename(tmp_path / "moved")
    before = {path.name for path in (tmp_path / "moved").iterdir()}
    quiet.put(2, sync=True)
    compact(quiet)
    assert after_restart(quiet, tmp_path) == by_key(quiet.chunks)
    assert {path.name for path in (tmp_path / "moved").iterdir()} == before


def test_a_folder_that_another_process_has_taken_is_not_written(index: Index, tmp_path: Path) -> None:
    index.put(1, sync=True)
    with held_up(index):
        shutil.rmtree(tmp_path / "store")
        other = SegmentStore(tmp_path / "store", 4 << 20)
    with pytest.raises(DiskFailedError, match="another process has locked a new folder of the same name"):
        index.put(2, sync=True)
    index.check()
    assert not list((tmp_path / "store").glob("*.kvs"))
    other.close()
    compact_until_well(index)
    index.put(3, sync=True)
    with pytest.raises(FolderInUseError):  # the folder is this store's again
        SegmentStore(tmp_path / "store", 4 << 20)


def test_where_it_cannot_be_made_again_puts_say_why(index: Index, tmp_path: Path) -> None:
    index.put(1, sync=True)
    shutil.rmtree(tmp_path / "store")
    (tmp_path / "store").write_text("a file in its place")
    for content in (2, 3):
        with pytest.raises(DiskError):
            index.put(content, sync=True)
    assert str(tmp_path / "store") in index.store.error
    index.check()
    (tmp_path / "store").unlink()
    compact_until_well(index)
    index.put(4, sync=True)


def test_a_removal_during_the_sync_is_noticed_before_the_put_is_acknowledged(tmp_path: Path) -> None:
    removals = [tmp_path / "store"]

    class RemovedWhileSyncing(SegmentFile):
        def sync(self) -> None:
            super().sync()
            if armed and removals:
                shutil.rmtree(removals.pop())

    armed = False
    store = opened(tmp_path / "store", RemovedWhileSyncing, sync_period_s=QUIET_S)
    store.recover()
    index = Index(store)
    index.put(0, sync=True)
    armed = True
    index.put(1, sync=True)
    assert not removals
    assert after_restart(index, tmp_path).items() >= by_key([index.where[1][1]]).items()
    compact(index)
    index.check()
    store.close()
