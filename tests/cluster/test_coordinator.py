import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from kvstore_api.placement import Member
from kvstore_cluster import coordinator as coordinator_module
from kvstore_cluster.catalogue import ClusterState, FileCatalogue
from kvstore_cluster.coordinator import MAX_PINS, Coordinator
from kvstore_cluster.failure_detector import FailureDetector
from kvstore_codec.errors import CatalogueError, TooManyPinsError, UnknownNodeError
from kvstore_codec.identity import ChunkId, ContentId
from tests.sample_chunk import sample_chunk

FIRST, SECOND = sample_chunk(1).chunk_id, sample_chunk(2).chunk_id
A, B = Member("a", "host:1"), Member("b", "host:2")
A_AGAIN = Member("a", "host:3")


@pytest.fixture
def catalogue(tmp_path: Path):
    catalogue = FileCatalogue(tmp_path)
    yield catalogue
    catalogue.close()


@pytest.fixture
def coordinator(catalogue: FileCatalogue) -> Iterator[Coordinator]:
    coordinator = Coordinator(catalogue)
    yield coordinator
    coordinator.close()


def test_the_epoch_grows_with_every_change_and_only_then(coordinator: Coordinator) -> None:
    assert (coordinator.membership().epoch, coordinator.membership().members) == (0, ())
    assert coordinator.join(B, 1).epoch == 1
    assert coordinator.join(A, 1).members == (A, B)
    assert coordinator.join(A, 1).epoch == 2
    coordinator.mark_dead("a", 1, "silent")
    assert (coordinator.membership().epoch, coordinator.membership().members) == (3, (B,))
    coordinator.mark_dead("a", 1, "silent")
    coordinator.mark_alive("b", 1)
    coordinator.leave("nobody", 1)
    assert coordinator.membership().epoch == 3
    coordinator.mark_alive("a", 1)
    coordinator.leave("b", 1)
    assert (coordinator.membership().epoch, coordinator.membership().members) == (5, (A,))


def test_a_dead_node_is_known_with_the_reason(coordinator: Coordinator) -> None:
    coordinator.join(A, 1)
    coordinator.mark_dead("a", 1, "connection refused")
    (record,) = coordinator.nodes()
    assert (record.alive, record.error) == (False, "connection refused")


def test_a_restarted_node_replaces_its_former_self(coordinator: Coordinator) -> None:
    coordinator.join(A, 1)
    coordinator.mark_dead("a", 1, "silent")
    assert coordinator.join(A_AGAIN, 2).members == (A_AGAIN,)


def test_a_node_whose_clock_went_back_joins_once_its_former_self_is_dead(coordinator: Coordinator) -> None:
    coordinator.join(A, 2)
    assert coordinator.join(A_AGAIN, 1).members == (A,)
    coordinator.mark_dead("a", 2, "silent")
    assert coordinator.join(A_AGAIN, 1).members == (A_AGAIN,)
    coordinator.mark_dead("a", 2, "late news")
    assert coordinator.membership().members == (A_AGAIN,)


def test_news_of_a_former_incarnation_change_nothing(coordinator: Coordinator) -> None:
    coordinator.join(A_AGAIN, 2)
    coordinator.join(A, 1)
    coordinator.mark_dead("a", 1, "late news")
    coordinator.leave("a", 1)
    assert (coordinator.membership().epoch, coordinator.membership().members) == (1, (A_AGAIN,))


def test_a_repeated_join_does_not_revive_a_node_that_clients_cannot_reach(coordinator: Coordinator) -> None:
    coordinator.join(A, 1)
    coordinator.mark_dead("a", 1, "silent")
    assert coordinator.join(A, 1).members == ()


def test_a_new_coordinator_goes_on_from_the_epoch_but_trusts_nobody(
    coordinator: Coordinator, catalogue: FileCatalogue
) -> None:
    coordinator.join(A, 1)
    coordinator.join(B, 1)
    successor = Coordinator(catalogue)
    assert (successor.membership().epoch, successor.membership().members) == (2, ())
    assert [node.member for node in successor.nodes()] == [A, B]
    successor.mark_alive("a", 1)
    assert (successor.membership().epoch, successor.membership().members) == (3, (A,))
    successor.close()


def test_membership_goes_on_while_it_cannot_be_kept_and_is_kept_later(
    coordinator: Coordinator, catalogue: FileCatalogue, tmp_path: Path
) -> None:
    coordinator.join(A, 1)
    (tmp_path / "catalogue.tmp").mkdir()
    coordinator.join(B, 1)
    assert (coordinator.membership().epoch, coordinator.membership().members) == (2, (A, B))
    assert catalogue.load().epoch == 1
    coordinator.mark_dead("a", 1, "silent")
    (tmp_path / "catalogue.tmp").rmdir()
    wait_for(lambda: catalogue.load().epoch == 3)
    coordinator.leave("b", 1)
    wait_for(lambda: catalogue.load().epoch == 4)
    coordinator.close()


def test_a_death_does_not_wait_for_a_catalogue_that_hangs(tmp_path: Path) -> None:
    class Hanging(FileCatalogue):
        def save(self, state: ClusterState) -> None:
            assert answers.wait(60)
            super().save(state)

    answers = threading.Event()
    answers.set()
    with contextlib.closing(Hanging(tmp_path)) as catalogue:
        coordinator = Coordinator(catalogue)
        coordinator.join(A, 1)
        answers.clear()
        coordinator.mark_dead("a", 1, "silent")
        assert coordinator.membership().members == ()
        assert catalogue.load().epoch == 1
        answers.set()
        wait_for(lambda: catalogue.load().epoch == 2)
        coordinator.close()


def test_a_decision_that_cannot_be_kept_does_not_count(coordinator: Coordinator, tmp_path: Path) -> None:
    coordinator.join(A, 1)
    coordinator.pin([FIRST])
    before = coordinator.directives("a", 0)
    (tmp_path / "catalogue.tmp").mkdir()
    for decide in (
        lambda: coordinator.pin([SECOND]),
        lambda: coordinator.unpin([FIRST]),
        lambda: coordinator.set_quota("blue", 100),
        lambda: coordinator.drain("a"),
        coordinator.repair,
    ):
        with pytest.raises(CatalogueError, match="cannot be written"):
            decide()
    assert coordinator.directives("a", 0) == before
    (tmp_path / "catalogue.tmp").rmdir()
    assert coordinator.pin([SECOND]) == 2


def test_decisions_survive_the_coordinator(coordinator: Coordinator, catalogue: FileCatalogue) -> None:
    coordinator.join(A, 1)
    coordinator.join(B, 1)
    assert coordinator.pin([FIRST, SECOND]) == 2
    assert coordinator.unpin([SECOND]) == 1
    coordinator.set_quota("blue", 100)
    coordinator.set_quota("unlimited", (1 << 64) - 1)
    coordinator.set_quota("", 7)
    coordinator.set_quota("", 0)
    coordinator.drain("b")
    assert coordinator.repair() == 1
    successor = Coordinator(catalogue, replicas=2)
    successor.join(B, 2)
    assert successor.pins() == {FIRST}
    assert successor.quotas() == {"blue": 100, "unlimited": (1 << 64) - 1}
    assert successor.membership().members == (replace(B, draining=True),)
    assert successor.membership().replicas == 2
    assert successor.repair() == 2
    successor.cancel_drain("b")
    assert successor.membership().members == (B,)


def test_a_node_hears_of_pins_and_quotas_once(coordinator: Coordinator, catalogue: FileCatalogue) -> None:
    coordinator.join(A, 1)
    first = coordinator.directives("a", 0)
    assert (first.pins, first.quotas, first.repair_round) == ({}, {}, 0)
    again = coordinator.directives("a", first.version)
    assert (again.pins, again.quotas, again.version) == (None, None, first.version)
    coordinator.pin([FIRST])
    told = coordinator.directives("a", first.version)
    assert told.pins == {"": {FIRST}}
    # What was decided already is no news.
    coordinator.pin([FIRST])
    coordinator.set_quota("blue", 0)
    assert coordinator.directives("a", told.version).pins is None
    # Another coordinator may count alike and mean something else.
    assert Coordinator(catalogue).directives("a", told.version).pins == {"": {FIRST}}


def test_quotas_are_shared_by_weight_among_those_that_live(coordinator: Coordinator) -> None:
    coordinator.join(Member("a", "host:1", 1.0), 1)
    coordinator.join(Member("b", "host:2", 3.0), 1)
    coordinator.set_quota("blue", 1001)
    before = coordinator.directives("a", 0)
    assert before.quotas == {"blue": 251}
    assert coordinator.directives("b", 0).quotas == {"blue": 751}
    coordinator.mark_dead("b", 1, "silent")
    assert coordinator.directives("a", before.version).quotas == {"blue": 1001}


def test_what_a_draining_node_might_have_of_a_quota_is_for_the_others(coordinator: Coordinator) -> None:
    coordinator.join(A, 1)
    coordinator.join(B, 1)
    coordinator.set_quota("blue", 1000)
    coordinator.drain("a")
    assert coordinator.directives("a", 0).draining
    told = coordinator.directives("b", 0)
    assert (told.draining, told.quotas) == (False, {"blue": 1000})


def test_draining_is_for_known_nodes(coordinator: Coordinator) -> None:
    coordinator.join(A, 1)
    with pytest.raises(UnknownNodeError, match="no node 'z'; known are a"):
        coordinator.drain("z")
    with pytest.raises(UnknownNodeError, match="'a' is not draining"):
        coordinator.cancel_drain("a")
    coordinator.drain("a")
    assert coordinator.membership().epoch == 2
    coordinator.drain("a")
    assert coordinator.membership().epoch == 2
    # It is remembered when the node goes, so that a restart does not fill it again.
    coordinator.leave("a", 1)
    assert coordinator.join(A_AGAIN, 2).members == (replace(A_AGAIN, draining=True),)


def test_pins_have_a_limit(coordinator: Coordinator) -> None:
    chunks = [ChunkId(ContentId(number.to_bytes(32)), FIRST.prefix_id) for number in range(MAX_PINS)]
    assert coordinator.pin(chunks) == MAX_PINS
    with pytest.raises(TooManyPinsError, match="unpin some"):
        coordinator.pin([FIRST])
    assert coordinator.unpin(chunks) == 0


def test_each_tenant_can_pin_whatever_others_have_pinned(
    catalogue: FileCatalogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"MAX_PINS": 1000, "MAX_PINS_OF_TENANT": 110, "RESERVED_PINS": 10}.items():
        monkeypatch.setattr(coordinator_module, name, value)
    coordinator = Coordinator(catalogue, isolated=True)
    chunks = [ChunkId(ContentId(number.to_bytes(32)), FIRST.prefix_id) for number in range(111)]
    greedy = [f"greedy-{number}" for number in range(10)]
    for tenant in greedy:
        assert coordinator.pin(chunks[:110], tenant) == 110
    with pytest.raises(TooManyPinsError, match="at most 110 chunks"):
        coordinator.pin(chunks, greedy[0])
    assert coordinator.pin(chunks[:10], "late") == 10
    with pytest.raises(TooManyPinsError, match="ask its operator"):
        coordinator.pin(chunks[:11], "late")
    assert coordinator.unpin(chunks, greedy[0]) == 0
    assert coordinator.pin(chunks[:11], "late") == 11
    coordinator.close()


def test_the_tenants_with_pins_have_a_limit(
    catalogue: FileCatalogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coordinator_module, "MAX_PINNING_TENANTS", 2)
    coordinator = Coordinator(catalogue, isolated=True)
    for tenant in ("a", "b"):
        coordinator.pin([FIRST], tenant)
    with pytest.raises(TooManyPinsError, match="ask its operator"):
        coordinator.pin([FIRST], "c")
    coordinator.close()


class Network:
    """Which nodes answer."""

    def __init__(self) -> None:
        self.silent: set[str] = set()

    def probe(self, members: Sequence[Member]) -> list[str | None]:
        return ["no answer" if member.node_id in self.silent else None for member in members]


@pytest.fixture
def network() -> Network:
    return Network()


@pytest.fixture
def detector(coordinator: Coordinator, network: Network):
    detector = FailureDetector(coordinator, network.probe, period_s=0.01)
    detector.start()
    yield detector
    detector.stop()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_silent_node_dies_and_comes_back(
    coordinator: Coordinator, network: Network, detector: FailureDetector
) -> None:
    coordinator.join(A, 1)
    coordinator.join(B, 1)
    network.silent.add("a")
    wait_for(lambda: coordinator.membership().members == (B,))
    assert coordinator.nodes()[0].error == "no answer"
    network.silent.clear()
    wait_for(lambda: coordinator.membership().members == (A, B))


def test_one_unanswered_probe_kills_nobody(coordinator: Coordinator, network: Network) -> None:
    coordinator.join(A, 1)
    detector = FailureDetector(coordinator, network.probe)
    for _ in range(3):
        network.silent.add("a")
        detector.check()
        network.silent.clear()
        detector.check()
    assert coordinator.membership().epoch == 1
