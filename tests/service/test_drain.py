"""Draining between real storage nodes behind real servers, all in this process."""

from collections.abc import Callable

import pytest

from kvstore_cluster.lookup import LookupRequest
from kvstore_codec.errors import NodeDrainingError
from tests.sample_chunk import sample_chunk
from tests.service.repair_cluster import Cluster, samples, wait_for


def test_a_draining_node_gives_all_it_has_and_says_when(make_cluster: Callable[[int], Cluster]) -> None:
    cluster = make_cluster(1)
    for name in ("a", "b", "c"):
        cluster.add(name)
    chunks = samples(60)
    cluster.store(chunks)
    cluster.settle()
    held = cluster.cells["a"].node.stats().chunks
    assert held > 5
    late = sample_chunk(1001)
    begun = cluster.cells["a"].node.begin_put(late.chunk_id, late.encoding, len(late.data))
    assert begun is not None
    begun.write(late.data)
    cluster.coordinator.drain("a")
    cluster.tick()
    gauges = cluster.cells["a"].gauges
    assert (gauges["draining"], gauges["drain_left"], gauges["drain_stuck"]) == (1, held, 0)
    wait_for(lambda: cluster.cells["a"].gauges["drain_left"] == 0)
    assert cluster.whole(chunks)
    assert all(owners[0].node_id != "a" for owners in cluster.owners(chunks))
    # Clients of an older membership cannot add to it, not even with what was under way,
    with pytest.raises(NodeDrainingError, match="a is draining"):
        cluster.cells["a"].put(sample_chunk(1000))
    with pytest.raises(NodeDrainingError):
        begun.commit()
    # It still has what it gave, for readers of an older membership, and may go.
    assert cluster.cells["a"].node.stats().chunks == held
    cluster.lose("a")
    cluster.settle()
    assert cluster.whole(chunks)


def test_a_drain_that_cannot_end_says_what_is_left(make_cluster: Callable[[int], Cluster]) -> None:
    cluster = make_cluster(1)
    cluster.add("a")
    chunks = samples(40)
    cluster.store(chunks)
    cluster.add("b", memory_bytes=256 << 10)
    cluster.coordinator.drain("a")
    full = cluster.cells["b"]
    others = [sample_chunk(number) for number in range(100, 140)]
    for chunk in others:
        full.put(chunk)
    evicted = full.node.stats().counters["evictions"]
    lease = full.node.lookup(
        LookupRequest([chunk.chunk_id for chunk in others], ["exact-zstd"], lease_s=60)
    ).lease_id
    assert lease is not None
    cluster.tick()
    wait_for(lambda: cluster.rested())
    gauges = cluster.cells["a"].gauges
    assert gauges["drain_left"] == gauges["drain_stuck"] == len(chunks)
    full.node.release_lease(lease)
    cluster.coordinator.drain("b")  # it has no room, so others take what it would own
    cluster.add("c")
    cluster.tick()
    wait_for(lambda: cluster.cells["a"].gauges["drain_left"] == 0)
    assert cluster.whole(chunks)
    assert full.node.stats().counters["evictions"] == evicted


def test_the_only_copy_is_not_given_to_nobody(make_cluster: Callable[[int], Cluster]) -> None:
    cluster = make_cluster(1)
    for name in ("a", "b"):
        cluster.add(name)
    chunks = samples(20)
    cluster.store(chunks)
    for name in ("a", "b"):
        cluster.coordinator.drain(name)
    cluster.settle()
    for cell in cluster.cells.values():
        held = cell.node.stats().chunks
        assert held
        assert (cell.gauges["drain_left"], cell.gauges["drain_stuck"]) == (held, held)


def test_what_a_draining_node_gives_pushes_nothing_out(make_cluster: Callable[[int], Cluster]) -> None:
    cluster = make_cluster(1)
    cluster.add("a")
    chunks = samples(60, frame_bytes=4000)
    cluster.store(chunks)
    small = cluster.add("b", memory_bytes=1 << 20)
    cluster.coordinator.drain("a")
    cluster.settle()
    wait_for(lambda: cluster.cells["a"].gauges["drain_left"] == cluster.cells["a"].gauges["drain_stuck"])
    given = small.node.stats().chunks
    assert 0 < given < len(chunks)
    assert cluster.cells["a"].gauges["drain_left"] == len(chunks) - given
    assert small.node.stats().counters["evictions"] == 0
