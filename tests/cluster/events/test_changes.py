"""A node tells which of its chunks entered or left a tier."""

import contextlib
import random

from kvstore_cluster.arena import Arena
from kvstore_cluster.disk import SegmentStore
from kvstore_cluster.events.base import IN_MEMORY, ON_DISK
from kvstore_cluster.events.changes import TierChanges
from kvstore_cluster.node import StorageNode
from kvstore_codec.errors import ChunkNotFoundError
from tests.clock import Clock
from tests.cluster.disk_node import BLOCK, MEMORY, SEGMENT, chunk_of, put, read

BOTH = IN_MEMORY | ON_DISK


def changes_of(node: StorageNode) -> TierChanges:
    assert node.changes is not None
    return node.changes


def taken(node: StorageNode) -> dict[tuple[str, bytes], int]:
    """State of all chunks that changed."""
    found: dict[tuple[str, bytes], int] = {}
    more = True
    while more:
        states, _, _, more = changes_of(node).take()
        found |= {(tenant, block): tiers for tenant, of in states.items() for block, tiers in of.items()}
    return found


def listed(node: StorageNode) -> dict[tuple[str, bytes], int]:
    found: dict[tuple[str, bytes], int] = {}
    cursor, first = 0, True
    while cursor or first:
        first = False
        variants, cursor = node.list(cursor)
        for variant in variants:
            key = variant.tenant, variant.chunk_id.prefix_id
            tiers = IN_MEMORY * variant.in_memory + ON_DISK * variant.on_disk
            found[key] = found.get(key, 0) | tiers
    return found


def test_a_put_a_deletion_and_nothing_else_are_told() -> None:
    node = StorageNode("node-0", Arena(MEMORY, BLOCK), events=True)
    chunk = chunk_of(1)
    assert not changes_of(node).wait(0)
    put(node, chunk, tenant="a")
    assert changes_of(node).wait(0)
    assert taken(node) == {("a", chunk.chunk_id.prefix_id): IN_MEMORY}
    read(node, chunk)
    assert not changes_of(node).wait(0)
    node.delete([chunk.chunk_id])
    assert taken(node) == {("a", chunk.chunk_id.prefix_id): 0}


def test_a_chunk_in_two_encodings_is_stored_until_both_are_gone() -> None:
    node = StorageNode("node-0", Arena(MEMORY, BLOCK), events=True)
    chunks = [chunk_of(1), chunk_of(1, "exact-raw")]
    for chunk in chunks:
        put(node, chunk)
    assert list(taken(node).values()) == [IN_MEMORY]
    node.delete([chunks[0].chunk_id])
    assert list(taken(node).values()) == [0]


def test_a_node_without_events_remembers_nothing() -> None:
    node = StorageNode("node-0", Arena(MEMORY, BLOCK))
    put(node, chunk_of(1))
    assert node.changes is None


def test_what_is_told_equals_the_node_through_evictions_demotions_promotions_expiry_and_a_restart(
    tmp_path,
) -> None:
    clock, told = Clock(), {}
    store = SegmentStore(tmp_path, 3 << 20, segment_bytes=SEGMENT)
    node = StorageNode("node-0", Arena(MEMORY, BLOCK), store=store, clock=clock, events=True)
    order = random.Random(1)
    for step in range(120):
        number = order.randrange(60)
        put(node, chunk_of(number), tenant=f"tenant {number % 2}", ttl_s=order.choice([0, 0, 30]))
        if order.random() < 0.3:
            stored = [variant for variant in node.list()[0] if not variant.in_memory]
            if stored:
                with (
                    contextlib.suppress(ChunkNotFoundError),  # it has expired
                    node.open(stored[0].chunk_id, stored[0].encoding) as reader,
                ):
                    list(reader.pieces(0, 0, 1 << 20))
        if order.random() < 0.1:
            node.delete([chunk_of(order.randrange(60)).chunk_id])
        clock.now_s += 1
        if step % 7 == 0:
            node.maintain()
            told.update(taken(node))
            assert {key: tiers for key, tiers in told.items() if tiers} == listed(node)
    counters = node.stats().counters
    assert all(counters[name] for name in ("evictions", "demotions", "promotions", "expired", "deletes"))
    store.close()
    store = SegmentStore(tmp_path, 3 << 20, segment_bytes=SEGMENT)
    again = StorageNode("node-0", Arena(MEMORY, BLOCK), store=store, clock=clock, events=True)
    changes_of(again).report_all()
    states, from_scratch, complete, more = changes_of(again).take()
    assert (from_scratch, complete, more) == (True, True, False)
    assert {(t, b): tiers for t, of in states.items() for b, tiers in of.items()} == listed(again)
    assert set(listed(again).values()) == {ON_DISK}
    store.close()


def test_more_changes_than_are_remembered_make_the_node_tell_everything() -> None:
    node = StorageNode("node-0", Arena(MEMORY, BLOCK), events=True)
    changes = TierChanges(node._index, node._lock, most=4)
    node._catalog.changes = changes
    for number in range(10):
        put(node, chunk_of(number))
    assert changes.overflows
    states, from_scratch, _, _ = changes.take()
    assert from_scratch
    assert len(states[""]) == 10
    assert node.stats().gauges["events_overflows"] == changes.overflows
