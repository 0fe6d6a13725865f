"""Tenants that an operator has forgotten: their chunks leave a node, and neither a restart nor another node brings them
back."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore_api.placement import Member
from kvstore_cluster import forgotten as limits
from kvstore_cluster.arena import Arena
from kvstore_cluster.catalogue import ClusterState, FileCatalogue
from kvstore_cluster.catalogue.document import read_document, write_document
from kvstore_cluster.coordinator import Coordinator
from kvstore_cluster.disk.forgotten import ForgottenRecords, read_forgotten, write_forgotten
from kvstore_cluster.disk.store import SegmentStore
from kvstore_cluster.durability import Durability
from kvstore_cluster.encryption import FileCipher
from kvstore_cluster.forgotten import Forgotten
from kvstore_cluster.lookup import LookupRequest
from kvstore_cluster.node import StorageNode
from kvstore_cluster.put import PutOptions
from kvstore_cluster.tenant_usage import TenantUsage
from kvstore_codec.errors import DiskFailedError, ForgottenTenantError
from tests.cluster.disk_node import Opener, chunk_of, put, read, stored
from tests.sample_chunk import SampleChunk

MEMBER = Member("node-0", "host:1")
RED, BLUE = [chunk_of(number) for number in range(4)], [chunk_of(number) for number in range(10, 14)]


@pytest.fixture
def coordinator(tmp_path: Path) -> Iterator[Coordinator]:
    catalogue = FileCatalogue(tmp_path / "catalogue")
    coordinator = Coordinator(catalogue)
    yield coordinator
    coordinator.close()
    catalogue.close()


def fill(node: StorageNode) -> None:
    for red, blue in zip(RED, BLUE, strict=True):
        assert put(node, red, tenant="red")
        assert put(node, blue, tenant="blue")


def kept(node: StorageNode) -> set[str]:
    """The tenants of which anything is stored."""
    return set(node.usage())


def register(coordinator: Coordinator, node: StorageNode, incarnation: int) -> bool:
    """What a node does every second. Whether it was a member before it had applied anything."""
    heard = coordinator.register(MEMBER, incarnation, 0, node.forgotten_generation)
    node.forget(heard.forgotten)
    return bool(heard.membership.members)


def test_all_chunks_of_a_tenant_go_and_no_others(opened: Opener) -> None:
    node = opened()
    fill(node)
    node.set_pins({"": {RED[0].chunk_id}})
    lease = node.lookup(LookupRequest([RED[1].chunk_id], [RED[1].encoding], 60)).lease_id
    with node.open(RED[2].chunk_id, RED[2].encoding) as reader:
        node.forget(Forgotten({"red": 5}))
        assert kept(node) == {"blue"}
        assert not any(stored(node, chunk) for chunk in RED)
        # A reader that has begun goes on; nobody else gets these bytes.
        assert b"".join(view for views in reader.pieces(0, 0, 1 << 20) for view in views) == RED[2].data
    assert all(read(node, chunk) == chunk.data for chunk in BLUE)
    assert lease is not None
    node.release_lease(lease)
    node.check_integrity()
    assert node.stats().counters["deletes"] == len(RED)


def test_usage_counts_each_tier(opened: Opener) -> None:
    node = opened(durability=Durability.MEMORY)
    fill(node)
    size = len(RED[0].data)
    assert node.usage("red") == {
        "red": TenantUsage(4, sum(len(c.data) for c in RED), 4, sum(len(c.data) for c in RED))
    }
    while node.maintain():
        pass
    red = node.usage()["red"]
    assert (red.chunks, red.memory_chunks, red.disk_chunks) == (4, 4, 4)
    assert red.bytes == red.memory_bytes == red.disk_bytes >= 4 * size * 0.9
    assert node.usage("green") == {}


def test_a_restart_recovers_nothing_of_a_forgotten_tenant_not_even_what_was_evicted(opened: Opener) -> None:
    node = opened(disk_bytes=4 << 20)
    fill(node)
    index, catalog = node._index, node._catalog
    with node._lock:  # as eviction does: without a tombstone, so that a restart may recover it
        slot = index.find(RED[0].chunk_id, RED[0].encoding)
        assert slot is not None
        catalog.remove(slot)
    node = opened(disk_bytes=4 << 20)
    assert stored(node, RED[0]), "eviction has become durable; then this test shows nothing"
    with node._lock:
        slot = node._index.find(RED[0].chunk_id, RED[0].encoding)
        assert slot is not None
        node._catalog.remove(slot)
    node.forget(Forgotten({"red": 5}))
    assert put(node, RED[3], tenant="red")
    for _ in range(2):
        node = opened(disk_bytes=4 << 20)
        assert node.forgotten_generation == 5
        assert [stored(node, chunk) for chunk in RED] == [False, False, False, True]
        assert all(read(node, chunk) == chunk.data for chunk in (*BLUE, RED[3]))


def test_a_node_that_was_away_forgets_before_it_is_a_member(opened: Opener, coordinator: Coordinator) -> None:
    node = opened()
    assert not register(coordinator, node, 1) or kept(node) == set()
    fill(node)
    coordinator.mark_dead("node-0", 1, "gone")
    coordinator.pin([RED[0].chunk_id], "red")
    coordinator.set_quota("red", 1 << 30)
    generation = coordinator.forget("red", with_pins=True)
    assert (coordinator.pins("red"), coordinator.quotas()) == (frozenset(), {"red": 1 << 30})
    assert coordinator.not_applied(generation) == ["node-0"]
    node = opened()
    assert all(stored(node, chunk) for chunk in RED), "it comes back with its disk"
    assert not register(coordinator, node, 2)
    assert kept(node) == {"blue"}
    assert register(coordinator, node, 2)
    assert coordinator.not_applied(generation) == []
    # What the tenant stores from now on is kept, also over restarts.
    assert put(node, RED[0], tenant="red")
    for incarnation in (3, 4):
        node = opened()
        assert register(coordinator, node, incarnation)
        assert read(node, RED[0]) == RED[0].data
    assert coordinator.forget("red", with_pins=True) > generation
    register(coordinator, node, 4)
    assert kept(node) == {"blue"}


def test_a_successor_of_the_coordinator_knows_who_was_forgotten(opened: Opener, tmp_path: Path) -> None:
    node = opened()
    fill(node)
    for number in range(2):
        catalogue = FileCatalogue(tmp_path / "catalogue")
        coordinator = Coordinator(catalogue)
        if not number:
            coordinator.forget("red", with_pins=False)
        else:
            assert not register(coordinator, node, 1)
            assert kept(node) == {"blue"}
        coordinator.close()
        catalogue.close()


def test_a_catalogue_that_was_lost_begins_after_what_nodes_have_applied(
    opened: Opener, coordinator: Coordinator, tmp_path: Path
) -> None:
    node = opened()
    coordinator.forget("blue", with_pins=False)
    register(coordinator, node, 1)
    fill(node)
    another = FileCatalogue(tmp_path / "another")
    successor = Coordinator(another)
    successor.forget("red", with_pins=False)
    register(successor, node, 1)
    assert kept(node) == {"blue"}
    successor.close()
    another.close()


def test_who_missed_more_than_is_remembered_keeps_nothing(
    opened: Opener, coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "MAX_FORGOTTEN", 2)
    node = opened()
    register(coordinator, node, 1)
    fill(node)
    for tenant in ("one", "two", "red", "three"):
        coordinator.forget(tenant, with_pins=False)
        register(coordinator, node, 1)
    assert kept(node) == {"blue"}
    node = opened()
    for tenant in ("four", "five", "six"):
        coordinator.forget(tenant, with_pins=False)
    register(coordinator, node, 2)
    assert kept(node) == set()
    assert put(node, BLUE[0], tenant="blue")
    node = opened()
    register(coordinator, node, 3)
    assert (kept(node), len(coordinator._state.forgotten.tenants)) == ({"blue"}, 2)


def test_a_node_that_responds_again_is_no_member_before_it_has_forgotten(
    opened: Opener, coordinator: Coordinator
) -> None:
    node = opened()
    assert register(coordinator, node, 1)
    fill(node)
    coordinator.mark_dead("node-0", 1, "cut off")
    coordinator.forget("red", with_pins=False)
    coordinator.mark_alive("node-0", 1)
    assert not coordinator.membership().members
    register(coordinator, node, 1)
    assert kept(node) == {"blue"}
    register(coordinator, node, 1)
    coordinator.mark_alive("node-0", 1)
    assert coordinator.membership().members


def test_a_clock_behind_forgets_all_the_same(
    opened: Opener, coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The catalogue was lost, and what nodes have applied seems to come from the future."""
    node = opened()
    node.forget(Forgotten({"green": time.time_ns() // 1_000_000 + 10**9}))
    register(coordinator, node, 1)
    fill(node)
    generation = coordinator.forget("red", with_pins=False)
    assert coordinator.not_applied(generation) == ["node-0"]
    register(coordinator, node, 1)
    assert kept(node) == {"blue"}


def test_after_all_was_forgotten_new_records_have_higher_numbers(tmp_path: Path) -> None:
    """Also when no segment is left that tells the last one: lower ones would be dead after the next restart."""
    order = Forgotten({"red": 7}, floor=6)
    records = ForgottenRecords().with_applied(order, None, 1000)
    write_forgotten(tmp_path, records, FileCipher())
    found, key_name = read_forgotten(tmp_path, FileCipher())
    assert key_name == ""
    assert found.hides("blue", 1000)
    assert found.newest_sequence == 1000


def test_a_node_without_disk_forgets_too(coordinator: Coordinator) -> None:
    node = StorageNode("node-0", Arena(8 << 20, 4 << 10), isolated=True)
    register(coordinator, node, 1)
    fill(node)
    coordinator.forget("red", with_pins=True)
    register(coordinator, node, 1)
    assert kept(node) == {"blue"}
    node.check_integrity()


def begun(node: StorageNode, chunk: SampleChunk, **options: object):  # type: ignore[no-untyped-def]
    pending = node.begin_put(
        chunk.chunk_id,
        chunk.encoding,
        len(chunk.data),
        options=PutOptions(tenant="red", **options),  # type: ignore[arg-type]
    )
    assert pending is not None
    pending.write(chunk.data)
    return pending


def test_a_put_in_progress_is_forgotten_with_its_tenant(opened: Opener) -> None:
    node = opened()
    pending, revoked = begun(node, RED[0]), begun(node, RED[1])
    node.forget(Forgotten({"red": 5}))
    with pytest.raises(ForgottenTenantError):
        pending.commit()
    revoked.revoke()
    assert (kept(node), node.stats().counters["put_rejected"]) == (set(), 1)
    node.check_integrity()
    assert put(node, RED[2], tenant="red")
    node.forget(None)
    node = opened()
    assert node.forgotten_generation == 5
    assert [stored(node, chunk) for chunk in RED] == [False, False, True, False]


def test_a_copy_of_a_node_that_has_not_heard_is_refused(opened: Opener) -> None:
    node = opened()
    late = begun(node, RED[0], copied_at=4)
    node.forget(Forgotten({"red": 5}))
    with pytest.raises(ForgottenTenantError):
        late.commit()
    for copied_at in (0, 4):
        with pytest.raises(ForgottenTenantError):
            begun(node, RED[0], copied_at=copied_at)
    assert put(node, BLUE[0], tenant="blue", copied_at=4), "of another tenant"
    assert put(node, RED[0], tenant="red", copied_at=5), "of a node that has heard"
    assert put(node, RED[1], tenant="red"), "of a client"


@pytest.mark.parametrize("forget", [False, True], ids=["deleted", "forgotten"])
def test_a_chunk_that_goes_while_it_is_written_back_does_not_return(
    opened: Opener, monkeypatch: pytest.MonkeyPatch, forget: bool
) -> None:
    node = opened(durability=Durability.MEMORY)
    assert put(node, RED[0], tenant="red")
    store = node._catalog.store
    assert store is not None
    append = store.append

    def meanwhile(*arguments: object, **options: object) -> object:
        going = threading.Thread(
            target=lambda: node.forget(Forgotten({"red": 5})) if forget else node.delete([RED[0].chunk_id])
        )
        going.start()
        going.join()
        return append(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(store, "append", meanwhile)
    node.maintain()
    monkeypatch.undo()
    node.forget(None)
    node.maintain()
    node = opened()
    assert not stored(node, RED[0])
    assert node.forgotten_generation == (5 if forget else 0)


def test_a_disk_that_fails_meanwhile_is_told_later(opened: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    node = opened()
    fill(node)
    with monkeypatch.context() as failing:

        def fail(*_: object) -> None:
            raise DiskFailedError("no")

        failing.setattr(SegmentStore, "keep_forgotten", fail)
        node.forget(Forgotten({"red": 5}))
        assert (kept(node), node.forgotten_generation) == ({"blue"}, 5)
    node.forget(None)
    assert kept(opened()) == {"blue"}


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff", b"[" * 100_000, b'{"content": 1}'])
def test_without_a_sound_note_all_is_forgotten_again(opened: Opener, tmp_path: Path, content: bytes) -> None:
    node = opened()
    node.forget(Forgotten({"red": 5}))
    fill(node)
    note = tmp_path / "disk" / "forgotten.json"
    note.write_bytes(content or note.read_bytes().replace(b"5", b"6"))
    node = opened()
    assert node.forgotten_generation == 0
    node.forget(Forgotten({"red": 5}))
    assert kept(node) == {"blue"}


def test_what_is_not_kept_by_name_may_be_the_newest() -> None:
    forgotten = Forgotten({"gone": 1}, floor=3)
    assert forgotten.newest == 3
    assert forgotten.since(2) == Forgotten({}, 3)
    state = ClusterState(forgotten=forgotten)
    assert read_document(write_document(state), "catalogue").forgotten == forgotten
