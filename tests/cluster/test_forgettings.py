"""Forgetting a tenant while nodes join, again and again, and while its chunks are written and read."""

import itertools
import threading
import time
from pathlib import Path

import pytest

from kvstore_cluster import forgettings, tenant_removal
from kvstore_cluster.catalogue import ClusterState, FileCatalogue
from kvstore_cluster.coordinator import Coordinator
from kvstore_cluster.disk.forgotten import read_forgotten
from kvstore_cluster.durability import Durability
from kvstore_cluster.encryption import FileCipher
from kvstore_cluster.forgotten import Forgotten
from kvstore_codec.errors import ForgottenTenantError, TooManyForgettingsError
from tests.cluster.disk_node import Opener, chunk_of, put, stored
from tests.cluster.test_forgotten import BLUE, MEMBER, RED, begun, coordinator, fill

__all__ = ["coordinator"]


def test_a_tenant_that_is_forgotten_without_pause_keeps_no_node_away(
    opened: Opener, coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forgettings, "MAX_FORGETTINGS", 100)
    node = opened()
    coordinator.forget("red", with_pins=False)
    fill(node)
    for began in (1, 2):  # a node that starts, and one that starts again
        assert not coordinator.register(MEMBER, began, 0, 0).membership.members or began == 2
        coordinator.mark_dead("node-0", began - 1, "gone")
        for _ in range(2):
            heard = coordinator.register(MEMBER, began, 0, node.forgotten_generation)
            node.forget(heard.forgotten)
            coordinator.forget("red", with_pins=False)
        assert coordinator.membership().members
        assert coordinator.register(MEMBER, began, 0, node.forgotten_generation).forgotten is not None
    # And one that responds again.
    coordinator.mark_dead("node-0", 2, "cut off")
    coordinator.mark_alive("node-0", 2)
    assert not coordinator.membership().members
    heard = coordinator.register(MEMBER, 2, 0, node.forgotten_generation)
    node.forget(heard.forgotten)
    coordinator.forget("red", with_pins=False)
    coordinator.register(MEMBER, 2, 0, node.forgotten_generation)
    coordinator.mark_alive("node-0", 2)
    assert coordinator.membership().members


def test_a_forgetting_waits_for_a_node_that_is_joining(coordinator: Coordinator) -> None:
    """It has begun with older forgettings, and becomes a member before it has heard of this one."""
    first = coordinator.forget("red", with_pins=False)
    assert not coordinator.register(MEMBER, 1, 0, 0).membership.members
    second = coordinator.forget("blue", with_pins=False)
    assert coordinator.not_applied(second) == ["node-0"]
    assert coordinator.register(MEMBER, 1, 0, first).membership.members
    assert coordinator.not_applied(second) == ["node-0"]
    coordinator.register(MEMBER, 1, 0, second)
    assert coordinator.not_applied(second) == []


def test_a_tenant_can_be_forgotten_a_few_times_a_minute(
    coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    for _ in range(forgettings.MAX_FORGETTINGS):
        coordinator.forget("red", with_pins=False)
    with pytest.raises(TooManyForgettingsError, match="try again later"):
        coordinator.forget("red", with_pins=False)
    coordinator.forget("blue", with_pins=False)
    now_s += forgettings.FORGETTINGS_PERIOD_S
    coordinator.forget("red", with_pins=False)


def test_a_node_that_joins_while_a_decision_is_saved_changes_nothing_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The generation that was saved is the one that nodes apply, and that the caller waits for."""
    generations: set[int] = set()

    class JoinedMeanwhile(FileCatalogue):
        def save(self, state: ClusterState) -> None:
            super().save(state)
            generations.add(state.forgotten.newest)
            if not joining.ident:
                joining.start()
                while not coordinator.membership().members:
                    time.sleep(0.001)

    clock = itertools.count(10**18, 10**9)
    monkeypatch.setattr(time, "time_ns", lambda: next(clock))
    catalogue = JoinedMeanwhile(tmp_path / "catalogue")
    coordinator = Coordinator(catalogue)
    joining = threading.Thread(target=lambda: coordinator.join(MEMBER, 1))
    generation = coordinator.forget("red", with_pins=False)
    joining.join()
    assert generations == {generation}
    assert coordinator.membership().epoch == 1
    coordinator.close()
    catalogue.close()


def noted(tmp_path: Path) -> int:
    """The newest forgetting that a restart knows."""
    return read_forgotten(tmp_path / "disk", FileCipher())[0].applied.newest


def test_a_forgetting_is_noted_though_puts_and_readers_are_slow(opened: Opener, tmp_path: Path) -> None:
    node = opened()
    assert put(node, RED[0], tenant="red")
    slow = begun(node, RED[1])
    with node.open(RED[0].chunk_id, RED[0].encoding):
        node.forget(Forgotten({"red": 5}))
        assert noted(tmp_path) == 5
    with pytest.raises(ForgottenTenantError):
        slow.commit()
    assert put(node, RED[2], tenant="red")
    node = opened()
    assert [stored(node, chunk) for chunk in RED] == [False, False, True, False]


def test_a_forgetting_is_not_noted_before_a_write_in_progress_has_its_tombstone(
    opened: Opener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = opened(durability=Durability.RELAXED)
    store = node._catalog.store
    assert store is not None
    append = store.append

    def meanwhile(*arguments: object, **options: object) -> object:
        node.forget(Forgotten({"red": 5}))
        assert noted(tmp_path) == 0, "the record that follows would be recovered"
        return append(*arguments, **options)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(store, "append", meanwhile)
        with pytest.raises(ForgottenTenantError):
            begun(node, RED[0]).commit()
    node.forget(None)
    assert noted(tmp_path) == 5
    assert not stored(opened(), RED[0])


def test_what_is_stored_while_a_tenant_is_forgotten_stays(
    opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in the slot of a removed chunk, and where the forgotten chunk of the same name is not removed yet."""
    node, new = opened(), chunk_of(20)
    fill(node)
    locked_slice, slices = tenant_removal.locked_slice, itertools.count()

    def meanwhile(*arguments: object, **options: object):  # type: ignore[no-untyped-def]
        if next(slices) == 2:
            node.delete([BLUE[3].chunk_id])
            assert put(node, new, tenant="red")
            assert put(node, RED[3], tenant="red"), "it is already stored, and about to be removed"
        return locked_slice(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(tenant_removal, "SLICE_CHUNKS", 1)
    monkeypatch.setattr(tenant_removal, "locked_slice", meanwhile)
    node.forget(Forgotten({"red": 5}))
    for _ in range(2):
        assert [stored(node, chunk) for chunk in (*RED, new)] == [False, False, False, True, True]
        node.check_integrity()
        node = opened()


def test_who_finds_no_tombstone_to_write_knows_that_all_are_written(
    opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = opened()
    fill(node)
    store, writes, may_write = node._catalog.store, threading.Event(), threading.Event()
    assert store is not None
    forget = store.forget

    def slowly(*arguments: object) -> None:
        writes.set()
        assert may_write.wait(20)
        forget(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(store, "forget", slowly)
    first = threading.Thread(target=lambda: node.delete([RED[0].chunk_id]))
    second = threading.Thread(target=node._disk.write_tombstones)
    first.start()
    assert writes.wait(20)
    second.start()
    second.join(0.1)
    assert second.is_alive()
    may_write.set()
    first.join()
    second.join()
