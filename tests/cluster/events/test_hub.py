"""The coordinator merges what nodes report into the events of the cluster."""

import pytest

from kvstore_api.kv_events import (
    DISK,
    MEMORY,
    Cleared,
    Event,
    Removed,
    Stored,
    decode_batch,
    tenant_of,
    topic_of,
)
from kvstore_cluster.events.base import IN_MEMORY, ON_DISK, NodeReport
from kvstore_cluster.events.hub import EventHub

A, B = b"a" * 32, b"b" * 32


class Hub(EventHub):
    """A hub whose members are given."""

    def __init__(self, **limits: int) -> None:
        self.members = {("one", 1), ("two", 1)}
        super().__init__(lambda *node: node in self.members, **limits)
        self._numbers = 0

    def tell(
        self, node: str, tiers: dict[bytes, int], *, scratch: bool = False, life: int = 1, **more: bool
    ) -> bool:
        self._numbers += 1
        return self.report(NodeReport(node, life, self._numbers, {"t": tiers}, from_scratch=scratch, **more))

    def sent(self) -> list[Event]:
        return [event for batch in self.take_unsent(1000) for event in decode_batch(batch.payload)[1]]


@pytest.fixture
def hub() -> Hub:
    hub = Hub()
    assert hub.tell("one", {}, scratch=True)
    assert hub.tell("two", {}, scratch=True)
    assert hub.sent() == [Cleared()]
    return hub


def test_a_block_is_stored_with_its_first_copy_and_removed_with_its_last(hub: Hub) -> None:
    hub.tell("one", {A: IN_MEMORY | ON_DISK})
    assert hub.sent() == [Stored([A], MEMORY), Stored([A], DISK)]
    hub.tell("two", {A: IN_MEMORY})
    hub.tell("one", {A: ON_DISK})  # a demotion
    assert hub.sent() == []
    hub.tell("two", {A: 0})
    assert hub.sent() == [Removed([A], MEMORY)]
    hub.tell("one", {A: 0})
    assert hub.sent() == [Removed([A], DISK)]
    assert hub.stats()["blocks"] == 0


def test_what_only_a_lost_node_had_is_removed(hub: Hub) -> None:
    hub.tell("one", {A: IN_MEMORY, B: IN_MEMORY})
    hub.tell("two", {B: IN_MEMORY})
    hub.sent()
    hub.members.discard(("one", 1))
    hub.keep(hub.members)
    assert hub.sent() == [Removed([A], MEMORY)]
    assert not hub.tell("one", {A: IN_MEMORY})  # it is no member
    hub.members.add(("one", 1))
    assert not hub.tell("one", {A: IN_MEMORY})  # what it told before is forgotten
    assert hub.tell("one", {A: IN_MEMORY, B: IN_MEMORY}, scratch=True)
    assert hub.sent() == [Stored([A], MEMORY)]


def test_a_restarted_node_loses_what_it_does_not_tell_again(hub: Hub) -> None:
    hub.tell("one", {A: IN_MEMORY | ON_DISK, B: IN_MEMORY})
    hub.sent()
    hub.members.add(("one", 2))
    assert hub.tell("one", {A: ON_DISK}, scratch=True, life=2)
    assert hub.sent() == [Removed([A, B], MEMORY), Removed([A], DISK), Stored([A], DISK)]


def test_a_node_that_tells_everything_again_removes_only_what_is_gone(hub: Hub) -> None:
    hub.tell("one", {A: IN_MEMORY, B: IN_MEMORY})
    hub.sent()
    hub.tell("one", {A: IN_MEMORY}, scratch=True, complete=False)
    assert hub.sent() == []
    hub.tell("one", {}, complete=True)
    assert hub.sent() == [Removed([B], MEMORY)]


def test_a_report_that_comes_late_changes_nothing(hub: Hub) -> None:
    hub.tell("one", {A: IN_MEMORY})
    late = NodeReport("one", 1, 1, {"t": {A: 0}}, from_scratch=True)
    assert hub.report(late)
    assert hub.sent() == [Stored([A], MEMORY)]


def test_a_coordinator_that_does_not_know_a_node_makes_it_tell_everything() -> None:
    hub = Hub()
    assert not hub.tell("one", {A: IN_MEMORY})
    assert hub.tell("one", {A: IN_MEMORY}, scratch=True)
    assert hub.sent() == [Cleared(), Stored([A], MEMORY)]


def test_missed_batches_come_as_they_were_and_older_ones_as_a_snapshot() -> None:
    hub = Hub(kept_batches=4)
    hub.tell("one", {A: ON_DISK}, scratch=True)
    first = hub.take_unsent(10)[-1]
    for _ in range(2):
        hub.tell("one", {B: IN_MEMORY})
        hub.tell("one", {B: 0})
    batches = hub.take_unsent(10)
    last = batches[-1].sequence
    assert [b.sequence for b in batches] == list(range(first.sequence + 1, last + 1))
    assert list(hub.since("t", last)) == [(last, batches[-1].payload)]
    assert list(hub.since("t", last + 1)) == []
    for missed in (0, first.sequence, last + 2):
        snapshot = list(hub.since("t", missed))
        assert {sequence for sequence, _ in snapshot} == {last}
        events = [event for _, payload in snapshot for event in decode_batch(payload)[1]]
        assert events == [Cleared(), Stored([A], DISK)]
    assert hub.stats()["snapshots"] == 3
    assert [decode_batch(payload)[1] for _, payload in hub.since("unknown", 0)] == [[Cleared()]]


def test_batches_that_nobody_sends_are_dropped_and_counted() -> None:
    hub = Hub(kept_batches=2)
    hub.tell("one", {A: ON_DISK}, scratch=True)
    for tiers in (0, 1, 0, 1):
        hub.tell("one", {B: tiers})
    hub.tell("one", {B: 2})
    assert hub.stats()["dropped"] == hub.stats()["batches"] - 2
    first, second = hub.take_unsent(10)
    assert second.sequence == first.sequence + 1


def test_each_tenant_has_its_own_topic_which_begins_no_other_one() -> None:
    names = ["", "a", "ab", "a@", "a@b", "%40", "ä ö"]
    topics = [topic_of(name) for name in names]
    assert [tenant_of(topic) for topic in topics] == names
    assert not any(one.startswith(other) for one in topics for other in topics if one is not other)
    assert tenant_of(b"kv@kvstore@a") is None
    assert tenant_of(b"kv@kvstore@") is None
