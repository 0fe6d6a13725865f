from array import array

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvstore_cluster.expiry import ExpiryQueue

SLOTS = 40


class ExpiryMachine(RuleBasedStateMachine):
    """Whatever comes and goes: what is due comes soonest first, and stays until it is removed."""

    def __init__(self) -> None:
        super().__init__()
        self.times = array("d", [0.0] * SLOTS)
        self.queue = ExpiryQueue(self.times)
        self.waiting: set[int] = set()
        self.overdue: set[int] = set()

    @rule(slot=st.integers(0, SLOTS - 1), time_s=st.integers(1, 20))
    def add(self, slot: int, time_s: int) -> None:
        if slot not in self.waiting | self.overdue:
            self.times[slot] = time_s
            self.queue.add(slot)
            self.waiting.add(slot)

    @rule(slot=st.integers(0, SLOTS - 1))
    def remove(self, slot: int) -> None:
        if slot in self.waiting | self.overdue:
            self.queue.remove(slot)
            self.waiting.discard(slot)
            self.overdue.discard(slot)

    @rule(now_s=st.integers(0, 21), most=st.integers(1, 12), kept=st.sets(st.integers(0, SLOTS - 1)))
    def take_what_is_due(self, now_s: int, most: int, kept: set[int]) -> None:
        ended = sorted(
            (slot for slot in self.waiting if self.times[slot] <= now_s), key=self.times.__getitem__
        )
        due = self.queue.due(now_s, most)
        new = [slot for slot in due if slot in self.waiting]
        assert due[: len(new)] == new
        assert len(new) == min(most, len(ended))
        assert [self.times[slot] for slot in new] == [self.times[slot] for slot in ended[: len(new)]]
        assert len(due) == min(most, len(ended) + len(self.overdue))
        self.waiting -= set(new)
        self.overdue |= set(new)
        assert self.queue.has_due(now_s) == (len(ended) > len(new))
        for slot in set(due) - kept:
            self.remove(slot)

    @invariant()
    def every_slot_is_there_once(self) -> None:
        assert sorted(self.queue) == sorted(self.waiting | self.overdue)


TestExpiry = ExpiryMachine.TestCase
TestExpiry.settings = settings(max_examples=15, stateful_step_count=30, deadline=None)


def test_what_is_kept_although_its_time_is_over_does_not_hide_the_others() -> None:
    queue = ExpiryQueue(array("d", [1.0, 2.0, 3.0, 4.0]))
    for slot in range(4):
        queue.add(slot)
    assert [queue.due(9.0, 2) for _ in range(4)] == [[0, 1], [2, 3], [0, 1], [2, 3]]
