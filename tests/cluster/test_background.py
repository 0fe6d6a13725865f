"""Background loops outlive what goes wrong in them, and say so."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvstore_api.placement import Member, Membership
from kvstore_cluster.arena import Arena
from kvstore_cluster.background import BackgroundLoop, background_health
from kvstore_cluster.catalogue import ClusterState, FileCatalogue
from kvstore_cluster.coordinator import Coordinator, Directives
from kvstore_cluster.disk.store import SegmentStore
from kvstore_cluster.failure_detector import FailureDetector
from kvstore_cluster.maintenance import MaintenanceThread
from kvstore_cluster.node import StorageNode
from kvstore_cluster.repair import RepairWorker
from kvstore_codec.errors import StorageError

SOON_S = 30.0


class Faulty:
    """Stands before a part's method, and fails the first `times` that it is called."""

    def __init__(
        self, method: Callable[..., object], times: int = 1, error: type[Exception] = TypeError
    ) -> None:
        self._method, self._left, self._error = method, times, error
        self.works = threading.Event()

    def __call__(self, *arguments: object, **named: object) -> object:
        if self._left:
            self._left -= 1
            raise self._error("a mistake")
        self.works.set()
        return self._method(*arguments, **named)


@pytest.fixture
def node() -> StorageNode:
    return StorageNode("node-0", Arena(1 << 20, 4 << 10))


@pytest.fixture
def catalogue(tmp_path: Path) -> Iterator[FileCatalogue]:
    catalogue = FileCatalogue(tmp_path / "catalogue")
    yield catalogue
    catalogue.close()


def test_a_loop_with_a_period_waits_before_each_step() -> None:
    began_s, steps = time.monotonic(), threading.Semaphore(0)
    loop = BackgroundLoop("kvstore-test", steps.release, period_s=0.05)
    loop.start()
    for number in range(1, 4):
        assert steps.acquire(timeout=SOON_S)
        assert time.monotonic() - began_s >= number * 0.05
    loop.stop()
    rare = BackgroundLoop("kvstore-test", steps.release, period_s=1e6)
    rare.start()
    rare.stop()  # does not wait for the next step, and makes none
    assert rare.stopping.is_set()


def test_a_loop_goes_on_after_an_error_and_tells_of_it(caplog: pytest.LogCaptureFixture) -> None:
    before, may_work, steps = background_health().errors, threading.Event(), threading.Semaphore(0)

    def step() -> None:
        if not may_work.is_set():
            steps.release()
            raise TypeError("a mistake")
        steps.release()
        loop.stopping.wait(0.001)

    loop = BackgroundLoop("kvstore-test", step, longest_pause_s=0.001)
    with caplog.at_level(logging.INFO, "kvstore_cluster.background"):
        loop.start()
        for _ in range(10):
            assert steps.acquire(timeout=SOON_S)
        health = background_health()
        assert health.failing["kvstore-test"] == "TypeError: a mistake"
        assert health.errors >= before + 9
        may_work.set()
        while "kvstore-test" in background_health().failing:
            assert steps.acquire(timeout=SOON_S)
        loop.stop()
    records = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert [record.exc_info is not None for record in records[:4]] == [True, False, False, False]
    assert [record.getMessage() for record in records[1:4]] == [
        f"kvstore-test failed {times} times with: a mistake" for times in (2, 4, 8)
    ]
    assert len(records) < 8  # however often it failed
    assert "works again" in caplog.text


def test_an_error_that_is_told_in_words_needs_no_traceback(caplog: pytest.LogCaptureFixture) -> None:
    failed = threading.Event()

    def step() -> None:
        failed.set()
        raise StorageError("the disk is full")

    loop = BackgroundLoop("kvstore-test", step)
    loop.start()
    assert failed.wait(SOON_S)
    loop.stop()
    assert "kvstore-test" not in background_health().failing
    (record,) = caplog.records
    assert (record.getMessage(), record.exc_info) == (
        "kvstore-test failed and will try again: the disk is full",
        None,
    )


def test_a_stop_ends_a_pause_and_a_step_may_stop_its_loop() -> None:
    failed, ended = threading.Event(), threading.Event()

    def fail() -> None:
        failed.set()
        raise TypeError("a mistake")

    def end() -> None:
        last.stop()
        ended.set()

    failing, last = (
        BackgroundLoop("kvstore-fails", fail, longest_pause_s=1e6),
        BackgroundLoop("kvstore-last", end),
    )
    never = BackgroundLoop("kvstore-never", end)
    for loop in (failing, last):
        loop.start()
    assert failed.wait(SOON_S)
    assert ended.wait(SOON_S)
    for loop in (failing, last, never):
        loop.stop()
    assert not [t for t in threading.enumerate() if t.name in ("kvstore-fails", "kvstore-last")]


def test_a_node_is_looked_after_whatever_went_wrong(
    node: StorageNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    maintain = Faulty(node.maintain)
    monkeypatch.setattr(node, "maintain", maintain)
    maintenance = MaintenanceThread(node, Arena(1 << 20, 4 << 10), period_s=0.01)
    maintenance.start()
    assert maintain.works.wait(SOON_S)
    maintenance.stop()


def test_memory_that_cannot_be_made_ready_keeps_no_node_from_being_looked_after(
    node: StorageNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    arena = Arena(1 << 20, 4 << 10)
    maintain = Faulty(node.maintain, times=0)
    monkeypatch.setattr(node, "maintain", maintain)
    monkeypatch.setattr(arena, "populate", Faulty(arena.populate, times=1 << 30))
    maintenance = MaintenanceThread(node, arena, period_s=0.01)
    maintenance.start()
    assert maintain.works.wait(SOON_S)
    maintenance.stop()


@pytest.mark.parametrize("task", ["give_up_removed", "measure"])
def test_a_mistake_in_the_upkeep_of_a_disk_does_not_stop_syncs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str
) -> None:
    store = SegmentStore(tmp_path / "disk", 64 << 20, sync_period_s=0.01)
    store.recover()
    monkeypatch.setattr(store._log, task, Faulty(lambda: None, times=1 << 30))
    sync = Faulty(store._log.sync_written, times=0)
    monkeypatch.setattr(store._log, "sync_written", sync)
    for _ in range(3):
        assert sync.works.wait(SOON_S)
        sync.works.clear()
    store.close()


def test_nodes_are_watched_whatever_went_wrong(catalogue: FileCatalogue) -> None:
    probe = Faulty(lambda members: [None] * len(members))
    detector = FailureDetector(Coordinator(catalogue), probe, period_s=0.01)  # type: ignore[arg-type]
    detector.start()
    assert probe.works.wait(SOON_S)
    detector.stop()


def test_a_catalogues_file_is_watched_whatever_went_wrong(
    catalogue: FileCatalogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalogue.save(ClusterState(1))
    write = Faulty(catalogue._write)
    monkeypatch.setattr(catalogue, "_write", write)
    catalogue._path.unlink()
    assert write.works.wait(SOON_S)


def test_the_membership_is_kept_whatever_went_wrong(
    catalogue: FileCatalogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = Faulty(catalogue.save, times=2)
    monkeypatch.setattr(catalogue, "save", save)
    coordinator = Coordinator(catalogue)
    coordinator.join(Member("a", "host:1"), 1)
    assert save.works.wait(SOON_S)
    until_s = time.monotonic() + SOON_S
    while [node.member.node_id for node in catalogue.load().nodes] != ["a"] and time.monotonic() < until_s:
        time.sleep(0.01)
    assert [node.member.node_id for node in catalogue.load().nodes] == ["a"]
    coordinator.close()


class NoPeers:
    def __init__(self) -> None:
        self.closed = False

    def lacking(self, owner: Member, variants: object) -> object:
        raise AssertionError(owner, variants)

    push = room_bytes = lacking

    def close(self) -> None:
        self.closed = True


def test_repair_goes_on_whatever_went_wrong(node: StorageNode, monkeypatch: pytest.MonkeyPatch) -> None:
    walked = Faulty(node.list)
    monkeypatch.setattr(node, "list", walked)
    worker = RepairWorker(node, NoPeers(), bytes_per_s=1e6, period_s=0.01)  # type: ignore[arg-type]
    worker.start()
    members = (Member("node-0", "host:1"),)
    worker.update(Directives(Membership(1, members, 1), 1, None, None, 0, draining=False))
    assert walked.works.wait(SOON_S)
    until_s = time.monotonic() + SOON_S
    while not worker.gauges(0)["repair_epoch"] and time.monotonic() < until_s:
        time.sleep(0.01)
    assert worker.gauges(0)["repair_epoch"] == 1
    worker.stop()
