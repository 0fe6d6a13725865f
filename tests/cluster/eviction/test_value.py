"""What the value-aware policy thinks a chunk is worth."""

import random
from collections.abc import Callable

import pytest

from kvstore_cluster.eviction import S3Fifo, ValueAware

MIB = 1 << 20


def _identity(chunk: int) -> int:
    return (chunk + 1) * 0x9E3779B97F4A7C15 % (1 << 64)


def _filled(
    chunks: int,
    cost: Callable[[int], float] = lambda _: 256.0,
    size_bytes: Callable[[int], int] = lambda _: MIB,
) -> ValueAware:
    policy = ValueAware()
    for slot in range(chunks):
        policy.add(slot, identity=_identity(slot), size_bytes=size_bytes(slot), cost=cost(slot))
    return policy


def _touch_all_seldom(policy: ValueAware, chunks: int) -> None:
    """Second uses that teach it a half-life of `chunks` uses."""
    for slot in range(chunks):
        policy.touch(slot)


def test_like_chunks_go_in_order_of_use() -> None:
    policy = _filled(10)
    assert list(policy.victims()) == list(range(10))


def test_a_chunk_used_more_often_outlives_one_used_more_lately() -> None:
    policy = _filled(100)
    _touch_all_seldom(policy, 100)
    for _ in range(4):
        for filler in range(20, 100):
            policy.touch(filler)
        policy.touch(7)
    policy.touch(3)  # the latest of all, for the third time; 7 was used six times
    order = list(policy.victims())
    assert order.index(7) > order.index(3)


def test_what_saves_more_computing_per_byte_stays_longer() -> None:
    policy = _filled(100, cost=lambda slot: 1024.0 if slot == 5 else 256.0)
    _touch_all_seldom(policy, 100)
    assert list(policy.victims())[-1] == 5
    policy = _filled(100, size_bytes=lambda slot: 4 * MIB if slot == 95 else MIB)
    _touch_all_seldom(policy, 100)
    assert next(policy.victims()) == 95


def test_chunks_of_like_size_go_in_order_of_use() -> None:
    policy = _filled(100, size_bytes=lambda slot: MIB + slot * 7919 % 50 * (MIB // 100))
    _touch_all_seldom(policy, 100)
    assert list(policy.victims()) == list(range(100))


def test_attention_keeps_a_chunk() -> None:
    policy = _filled(100)
    _touch_all_seldom(policy, 100)
    for slot in range(100):
        policy.report(slot, 0.0)
    assert next(policy.victims()) == 0
    policy.report(0, 1.0)
    policy.report(0, 1.0)
    assert list(policy.victims())[-1] == 0
    with_score, without = _filled(2), _filled(2)
    with_score.report(0, 7.5)  # no share of anything: counts as all of it
    without.touch(0)
    assert list(with_score.victims()) == list(without.victims()) == [1, 0]


def test_an_evicted_chunk_that_comes_again_is_known() -> None:
    policy = _filled(100)
    policy.remove(0, evicted=True)
    policy.remove(1, evicted=False)  # deleted: nobody misses it
    policy.add(0, identity=_identity(0), size_bytes=MIB, cost=256.0)
    policy.add(1, identity=_identity(1), size_bytes=MIB, cost=256.0)
    assert policy.half_life_uses == 100  # 0 came back a hundred uses after its first
    assert list(policy.victims())[-1] == 0


def test_a_read_right_after_its_lookup_is_the_same_use() -> None:
    policy, other = _filled(1000), _filled(1000)
    _touch_all_seldom(policy, 1000)
    _touch_all_seldom(other, 1000)
    for _ in range(20):
        policy.touch(500)
    other.touch(500)
    assert list(policy.victims()) == list(other.victims())
    assert policy.half_life_uses == other.half_life_uses == 1000


def test_the_half_life_follows_the_workload() -> None:
    policy = _filled(4000)
    generator = random.Random(4)
    for interval in (500, 3000):
        fresh = 4000
        for _ in range(2 * interval + 3000):
            slot = fresh % 4000
            policy.remove(slot, evicted=True)
            policy.add(slot, identity=_identity(fresh + interval * 10**6), size_bytes=MIB, cost=256.0)
            if generator.random() < 0.5:
                policy.touch((fresh - interval // 2) % 4000)
            fresh += 1
        assert policy.half_life_uses == pytest.approx(0.75 * interval, rel=0.1)


@pytest.mark.parametrize("policy", [S3Fifo, ValueAware])
def test_costs_and_sizes_at_their_limits_are_taken(policy: type[S3Fifo] | type[ValueAware]) -> None:
    eviction = policy()
    for slot, (size_bytes, cost) in enumerate([(1, 1e300), ((1 << 32) - 1, 1e-300), (MIB, 1.0)]):
        eviction.add(slot, identity=(1 << 64) - 1 - slot, size_bytes=size_bytes, cost=cost)
        eviction.report(slot, 0.5)
    assert sorted(eviction.victims()) == [0, 1, 2]
