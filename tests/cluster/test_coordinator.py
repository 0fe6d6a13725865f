import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from kvstore_api.placement import Member
from kvstore_cluster.catalogue import FileCatalogue
from kvstore_cluster.coordinator import Coordinator
from kvstore_cluster.failure_detector import FailureDetector
from kvstore_codec.errors import CatalogueError

A, B = Member("a", "host:1"), Member("b", "host:2")
A_AGAIN = Member("a", "host:3")


@pytest.fixture
def catalogue(tmp_path: Path):
    catalogue = FileCatalogue(tmp_path)
    yield catalogue
    catalogue.close()


@pytest.fixture
def coordinator(catalogue: FileCatalogue) -> Coordinator:
    return Coordinator(catalogue)


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


def test_a_change_that_cannot_be_kept_does_not_happen(coordinator: Coordinator, tmp_path: Path) -> None:
    coordinator.join(A, 1)
    (tmp_path / "catalogue.tmp").mkdir()
    with pytest.raises(CatalogueError):
        coordinator.join(B, 1)
    assert (coordinator.membership().epoch, coordinator.membership().members) == (1, (A,))


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
    deadline = time.monotonic() + 5
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


def test_an_unwritable_catalogue_does_not_stop_the_detector(
    coordinator: Coordinator, network: Network, detector: FailureDetector, tmp_path: Path
) -> None:
    coordinator.join(A, 1)
    (tmp_path / "catalogue.tmp").mkdir()
    network.silent.add("a")
    time.sleep(0.1)
    assert coordinator.membership().members == (A,)
    (tmp_path / "catalogue.tmp").rmdir()
    wait_for(lambda: coordinator.membership().members == ())
