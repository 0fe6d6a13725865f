"""What every eviction policy keeps to, against models that are too slow and too simple to be wrong."""

import math
import tracemalloc
from collections import OrderedDict
from collections.abc import Sequence
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore_cluster.eviction import POLICIES, EvictionPolicy, LeastRecentlyUsed, S3Fifo, ValueAware

NAMES = sorted(POLICIES)
CAPACITY_BYTES = 100


class Store:
    """A tier of CAPACITY_BYTES that asks a policy what to evict; chunks are numbers, slots are used again."""

    def __init__(self, policy: EvictionPolicy) -> None:
        self.policy = policy
        self.slots: dict[int, int] = {}
        self.sizes: dict[int, int] = {}
        self.evicted: list[int] = []
        self._free = list(range(2 * CAPACITY_BYTES))

    def use(self, chunk: int, size_bytes: int, cost: float = 1.0) -> None:
        if chunk in self.slots:
            self.policy.touch(self.slots[chunk])
            return
        self._make_room(size_bytes)
        self.slots[chunk] = slot = self._free.pop()
        self.sizes[chunk] = size_bytes
        self.policy.add(slot, identity=_identity(chunk), size_bytes=size_bytes, cost=cost)

    def delete(self, chunk: int, *, evicted: bool = False) -> None:
        slot = self.slots.pop(chunk)
        del self.sizes[chunk]
        self._free.append(slot)
        self.policy.remove(slot, evicted=evicted)

    def order(self) -> list[int]:
        chunks = {slot: chunk for chunk, slot in self.slots.items()}
        return [chunks[slot] for slot in self.policy.victims()]

    def _make_room(self, size_bytes: int) -> None:
        chunks = {slot: chunk for chunk, slot in self.slots.items()}
        missing_bytes = sum(self.sizes.values()) + size_bytes - CAPACITY_BYTES
        victims = []
        for slot in self.policy.victims():
            if missing_bytes <= 0:
                break
            victims.append(chunks[slot])
            missing_bytes -= self.sizes[chunks[slot]]
        for chunk in victims:
            self.delete(chunk, evicted=True)
        self.evicted += victims


def _identity(chunk: int) -> int:
    return (chunk + 1) * 0x9E3779B97F4A7C15 % (1 << 64)


# A chunk of one to ten bytes is used, or deleted.
STEPS = st.lists(st.tuples(st.integers(0, 60), st.booleans()), max_size=400)


def _size(chunk: int) -> int:
    return 1 + chunk * 7 % 10


def _play(store: Store, steps: Sequence[tuple[int, bool]]) -> None:
    for chunk, delete in steps:
        if delete and chunk % 8 == 0 and chunk in store.slots:
            store.delete(chunk)
        else:
            store.use(chunk, _size(chunk))


@pytest.mark.parametrize("name", NAMES)
@given(steps=STEPS)
@settings(max_examples=40, deadline=None)
def test_every_slot_is_proposed_once_and_asking_changes_nothing_of_that(
    name: str, steps: list[tuple[int, bool]]
) -> None:
    store = Store(POLICIES[name]())
    _play(store, steps)
    for _ in range(3):
        assert sorted(store.order()) == sorted(store.slots)
        list(islice(store.policy.victims(), 3))
    assert len(store.policy) == len(store.slots)
    assert sum(store.sizes.values()) <= CAPACITY_BYTES


@pytest.mark.parametrize("name", NAMES)
@given(steps=STEPS, kept=st.sets(st.integers(0, 60)))
@settings(max_examples=40, deadline=None)
def test_what_the_caller_keeps_is_passed_over_and_stays(
    name: str, steps: list[tuple[int, bool]], kept: set[int]
) -> None:
    store = Store(POLICIES[name]())
    _play(store, steps)
    for chunk in [chunk for chunk in store.order() if chunk not in kept]:
        store.delete(chunk, evicted=True)
    assert sorted(store.order()) == sorted(kept & store.slots.keys())
    assert store.slots.keys() <= kept
    for chunk in list(store.slots):
        store.delete(chunk)
    assert store.order() == []
    assert len(store.policy) == 0


@given(steps=STEPS)
@settings(max_examples=100, deadline=None)
def test_lru_is_an_ordered_dictionary(steps: list[tuple[int, bool]]) -> None:
    store = Store(LeastRecentlyUsed())
    model: OrderedDict[int, None] = OrderedDict()
    for chunk, delete in steps:
        _play(store, [(chunk, delete)])
        model[chunk] = None
        model.move_to_end(chunk)
        for gone in model.keys() - store.slots.keys():
            del model[gone]
        assert store.order() == list(model)


class S3Model:
    """Algorithm 1 of the paper over plain lists, oldest first, sizes in bytes."""

    def __init__(self) -> None:
        self.small: list[int] = []
        self.main: list[int] = []
        self.ghosts: dict[int, int] = {}
        self.uses: dict[int, int] = {}
        self.forgone_bytes = 0

    def use(self, chunk: int) -> None:
        if chunk in self.small or chunk in self.main:
            self.uses[chunk] = min(3, self.uses[chunk] + 1)
            return
        while self._bytes() + _size(chunk) > CAPACITY_BYTES:
            self._evict()
        self.uses[chunk] = 0
        left_at = self.ghosts.pop(chunk, None)
        if left_at is not None and self.forgone_bytes - left_at <= 0.9 * (self._bytes() + _size(chunk)):
            self.main.append(chunk)
        else:
            self.small.append(chunk)

    def _bytes(self) -> int:
        return sum(map(_size, self.small + self.main))

    def _evict(self) -> None:
        while True:
            if self.small and (10 * sum(map(_size, self.small)) >= self._bytes() or not self.main):
                chunk = self.small.pop(0)
                if self.uses[chunk] < 2:
                    self.forgone_bytes += _size(chunk)
                    self.ghosts[chunk] = self.forgone_bytes
                    return
                self.uses[chunk] = 0
                self.main.append(chunk)
            else:
                chunk = self.main.pop(0)
                if not self.uses[chunk]:
                    return
                self.uses[chunk] -= 1
                self.main.append(chunk)


@given(chunks=st.lists(st.integers(0, 60), max_size=400))
@settings(max_examples=200, deadline=None)
def test_s3_fifo_is_the_papers(chunks: list[int]) -> None:
    store, model = Store(S3Fifo()), S3Model()
    for chunk in chunks:
        store.use(chunk, _size(chunk))
        model.use(chunk)
        assert store.slots.keys() == {*model.small, *model.main}


def test_s3_fifo_keeps_what_was_used_through_a_scan_and_takes_back_what_it_let_go() -> None:
    store = Store(S3Fifo())
    for _ in range(3):
        for chunk in range(50):
            store.use(chunk, 1)
    for scanned in range(1000, 1100):
        store.use(scanned, 1)
    assert store.slots.keys() >= set(range(50))
    assert 1010 not in store.slots
    store.use(1010, 1)  # a ghost: straight to the main queue
    for scanned in range(2000, 2040):
        store.use(scanned, 1)
    assert 1010 in store.slots


class ValueModel:
    """The formula of ValueAware for every chunk anew, all ghosts remembered."""

    def __init__(self, policy: ValueAware) -> None:
        self.policy = policy
        self.now = 0
        self.steps: dict[int, int] = {}
        self.used: dict[int, int] = {}
        self.savings: dict[int, int] = {}

    def use(self, chunk: int, present: int, cost: float) -> None:
        self.now += 1
        if not present:
            exact = round(16 * math.log2(cost / _size(chunk)))
            nearest = min(self.savings.values(), key=lambda known: abs(known - exact), default=exact)
            self.savings[chunk] = nearest if abs(nearest - exact) <= 16 else exact
        if chunk not in self.used:
            self.steps[chunk] = 0
        else:
            age = self.now - self.used[chunk]
            if not present or 32 * age > present:
                faded = self.steps[chunk] - int(age / self.policy.half_life_uses * 8)
                self.steps[chunk] = round(16 * math.log2(1 + 2 ** (max(faded, -96) / 16)))
        self.used[chunk] = self.now

    def rank(self, chunk: int) -> float:
        level = (self.savings[chunk] + self.steps[chunk]) // 4
        return self.used[chunk] + self.policy.half_life_uses / 4 * level


@given(chunks=st.lists(st.integers(0, 60), max_size=300))
@settings(max_examples=100, deadline=None)
def test_the_value_aware_order_is_its_formula(chunks: list[int]) -> None:
    policy = ValueAware()
    store, model = Store(policy), ValueModel(policy)
    for chunk in chunks:
        cost = 1.0 + chunk % 5
        present = len(store.slots) if chunk in store.slots else 0
        store.use(chunk, _size(chunk), cost)
        model.use(chunk, present, cost)
        ranks = [model.rank(known) for known in store.order()]
        assert ranks == pytest.approx(sorted(ranks))


@pytest.mark.parametrize(("name", "most_bytes"), [("lru", 8.6), ("s3-fifo", 38), ("value", 40.5)])
def test_a_slot_takes_few_bytes_with_its_share_of_the_ghosts(name: str, most_bytes: float) -> None:
    slots = 1_000_000
    tracemalloc.start()
    try:
        policy = POLICIES[name]()
        policy.add(slots - 1, identity=_identity(1), size_bytes=1 << 20, cost=256.0)
        used_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert list(policy.victims()) == [slots - 1]
    assert 8 <= used_bytes / slots <= most_bytes
