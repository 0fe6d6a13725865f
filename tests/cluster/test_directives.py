"""Pins, quotas and TTLs change while others are served, and hold for what comes and goes meanwhile."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from random import Random

import pytest

from kvstore_cluster import directives, migration
from kvstore_cluster.arena import Arena
from kvstore_cluster.lookup import LookupRequest
from kvstore_cluster.node import StorageNode
from kvstore_cluster.put import PutOptions
from kvstore_codec.errors import OverQuotaError
from tests.clock import Clock
from tests.sample_chunk import SampleChunk, sample_chunk

CHUNKS = [sample_chunk(content=number, frame_bytes=500) for number in range(12)]
MEMORY = 1 << 20


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def node(clock: Clock) -> Iterator[StorageNode]:
    node = StorageNode("node-0", Arena(MEMORY, 4 << 10), clock=clock)
    yield node
    node.check_integrity()


@pytest.fixture
def between(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], object]]:
    """What happens, once each, between the slices of a directive, of two chunks each."""
    steps: list[Callable[[], object]] = []

    @contextmanager
    def sliced(lock: threading.Condition, *, first: bool) -> Iterator[None]:
        assert not first
        if steps:
            # In another thread, because the lock lets its owner in.
            working = threading.Thread(target=steps.pop(0))
            working.start()
            working.join(60)
            assert not working.is_alive()
        with lock:
            yield

    monkeypatch.setattr(directives, "locked_slice", sliced)
    monkeypatch.setattr(directives, "SLICE_CHUNKS", 2)
    monkeypatch.setattr(migration, "REMOVED_CHUNKS", 2)
    return steps


def put(node: StorageNode, chunk: SampleChunk, tenant: str = "", ttl_s: float = 0.0) -> bool:
    options = PutOptions(tenant=tenant, ttl_s=ttl_s)
    pending = node.begin_put(chunk.chunk_id, chunk.encoding, len(chunk.data), options=options)
    if pending is None:
        return False
    pending.write(memoryview(chunk.data))
    return pending.commit()


def stored(node: StorageNode, chunks: list[SampleChunk]) -> list[bool]:
    answers = node.lookup(
        LookupRequest([chunk.chunk_id for chunk in chunks], ["exact-zstd"], peek=True)
    ).answers
    return [answer.encoding is not None for answer in answers]


def test_others_are_served_while_pins_and_quotas_change(
    node: StorageNode, between: list[Callable[[], object]]
) -> None:
    for chunk in CHUNKS:
        put(node, chunk, tenant="acme")
    served: list[list[bool]] = []
    for change in (
        lambda: node.set_pins({"": {chunk.chunk_id for chunk in CHUNKS}}),
        lambda: node.set_pins({}),
        lambda: node.set_quotas({"acme": 1 << 30}),
    ):
        between += [lambda: served.append(stored(node, CHUNKS[:1]))] * 6
        change()
        assert not between
    assert served == [[True]] * 18


def test_a_chunk_that_comes_while_pins_change_is_pinned_or_not_as_they_say(
    node: StorageNode, between: list[Callable[[], object]]
) -> None:
    put(node, CHUNKS[0])
    node.set_pins({"": {CHUNKS[0].chunk_id, CHUNKS[1].chunk_id}})
    between += [lambda: put(node, CHUNKS[1]), lambda: put(node, CHUNKS[2])]
    node.set_pins({"": {chunk.chunk_id for chunk in CHUNKS[2:]}})
    pinned = {variant.chunk_id for variant in node.list()[0] if variant.pinned}
    assert pinned == {CHUNKS[2].chunk_id}


def test_a_quota_counts_what_comes_and_goes_while_it_is_set(
    node: StorageNode, between: list[Callable[[], object]]
) -> None:
    for chunk in CHUNKS[:6]:
        put(node, chunk, tenant="acme")
    between += [
        lambda: put(node, CHUNKS[6], tenant="acme"),
        lambda: node.delete([CHUNKS[0].chunk_id, CHUNKS[5].chunk_id]),
        lambda: put(node, CHUNKS[7], tenant="acme"),
    ]
    size_bytes = sum(len(CHUNKS[number].data) for number in (1, 2, 3, 4, 6, 7))
    node.set_quotas({"acme": size_bytes})
    node.check_integrity()
    assert stored(node, CHUNKS[:8]) == [False, True, True, True, True, False, True, True]
    assert put(node, CHUNKS[8], tenant="acme")
    assert stored(node, CHUNKS[6:9]) == [True] * 3, "what came last goes last"
    assert stored(node, CHUNKS[1:5]).count(False) in (1, 2)


def test_a_quota_may_end_and_come_again(node: StorageNode) -> None:
    limit = 3 * len(CHUNKS[0].data) * 2
    for begin in (0, 6):
        for chunk in CHUNKS[begin : begin + 3]:
            put(node, chunk, tenant="acme")
        node.set_quotas({"acme": limit})
        node.check_integrity()
        node.set_quotas({})
        put(node, CHUNKS[begin + 3], tenant="acme")
        node.check_integrity()
    node.delete([chunk.chunk_id for chunk in CHUNKS])
    node.set_quotas({"acme": 10})
    with pytest.raises(OverQuotaError):
        put(node, CHUNKS[0], tenant="acme")


def test_orders_of_tenants_stay_right_in_whatever_order_things_happen(node: StorageNode) -> None:
    choose = Random(11)
    for _ in range(300):
        chunk, tenant = choose.choice(CHUNKS), choose.choice("ab")
        match choose.randrange(5):
            case 0 | 1:
                put(node, chunk, tenant=tenant, ttl_s=choose.choice((0.0, 60.0)))
            case 2:
                node.delete([chunk.chunk_id])
            case 3:
                node.lookup(LookupRequest([chunk.chunk_id], ["exact-zstd"]))
            case 4:
                node.set_quotas({name: 1 << 30 for name in "ab" if choose.random() < 0.5})
        node.check_integrity()


@pytest.mark.usefixtures("between")
def test_what_expires_goes_a_slice_at_a_time(node: StorageNode, clock: Clock) -> None:
    for number, chunk in enumerate(CHUNKS):
        put(node, chunk, ttl_s=10.0 if number % 2 else 0.0)
    clock.now_s += 11
    lease = node.lookup(LookupRequest([CHUNKS[0].chunk_id], ["exact-zstd"], lease_s=60.0)).lease_id
    assert lease is not None
    assert node._migration.expire(clock.now_s)
    assert node.stats().counters["expired"] == 2
    node.maintain()
    assert stored(node, CHUNKS) == [number % 2 == 0 for number in range(12)]
    assert node.stats().chunks == 6
    assert not node._migration.expire(clock.now_s)


@pytest.mark.usefixtures("between")
def test_leased_chunks_that_expired_do_not_keep_the_maintenance_thread_busy(
    node: StorageNode, clock: Clock
) -> None:
    for chunk in CHUNKS:
        put(node, chunk, ttl_s=10.0)
    ids = [chunk.chunk_id for chunk in CHUNKS]
    lease = node.lookup(LookupRequest(ids, ["exact-zstd"], lease_s=60.0)).lease_id
    assert lease is not None
    clock.now_s += 11
    for _ in range(2):
        node.maintain()  # returns, although nothing that expired may be removed
        assert node.stats().chunks == len(CHUNKS)
    node.release_lease(lease)
    for _ in range(len(CHUNKS)):
        node.maintain()  # examines a slice of the chunks that were leased
    assert node.stats().chunks == 0


def test_a_leased_chunk_outlives_its_time_until_the_lease_ends(node: StorageNode, clock: Clock) -> None:
    put(node, CHUNKS[0], ttl_s=10.0)
    lease = node.lookup(LookupRequest([CHUNKS[0].chunk_id], ["exact-zstd"], lease_s=60.0)).lease_id
    clock.now_s += 11
    node.maintain()
    assert node.stats().chunks == 1
    assert lease is not None
    node.release_lease(lease)
    node.maintain()
    assert node.stats().chunks == 0
