"""Repair between real storage nodes behind real servers, all in this process."""

import time
from collections.abc import Callable

from kvstore_api.placement import Member
from tests.service.repair_cluster import Cluster, samples, wait_for


def test_after_a_loss_every_chunk_is_on_its_owners_again(make_cluster: Callable[[int], Cluster]) -> None:
    cluster = make_cluster(2)
    for name in ("a", "b", "c"):
        cluster.add(name)
    chunks = samples(60)
    cluster.store(chunks)
    cluster.settle()
    assert sum(cell.sent for cell in cluster.cells.values()) == 0
    lost = {chunk.chunk_id for chunk in chunks if cluster.cells["c"].has(chunk)}
    cluster.lose("c")
    cluster.settle()
    assert cluster.whole(chunks)
    # Each of the lost copies once: nobody sends what another one sends.
    assert sum(cell.sent for cell in cluster.cells.values()) == len(lost)
    assert sum(cell.node.stats().counters["puts"] for cell in cluster.cells.values()) == 2 * len(chunks)


def test_the_best_owner_that_has_a_chunk_sends_it(make_cluster: Callable[[int], Cluster]) -> None:
    cluster = make_cluster(4)
    for name in ("a", "b", "c", "d"):
        cluster.add(name)
    chunks = samples(40)
    first: dict[str, int] = dict.fromkeys(cluster.cells, 0)
    for chunk, owners in zip(chunks, cluster.owners(chunks), strict=True):
        for owner in owners[1:3]:
            cluster.cells[owner.node_id].put(chunk)
        first[owners[1].node_id] += 2
    cluster.settle()
    assert cluster.whole(chunks)
    assert {name: cell.sent for name, cell in cluster.cells.items()} == first


def test_a_joined_node_is_filled_at_the_bounded_rate_and_readers_find_everything_meanwhile(
    make_cluster: Callable[[int], Cluster],
) -> None:
    cluster = make_cluster(1)
    for name in ("a", "b"):
        cluster.add(name, bytes_per_s=400e3)
    chunks = samples(60, frame_bytes=2000)
    cluster.store(chunks)
    cluster.settle()
    joined = cluster.add("c", bytes_per_s=400e3)
    cluster.tick()
    began_s = time.monotonic()
    moved = [
        c for c, owners in zip(chunks, cluster.owners(chunks), strict=True) if owners[0] == joined.member
    ]
    assert len(moved) > 10
    seen = set()
    while not cluster.rested():
        assert time.monotonic() - began_s < 30
        readers = cluster.placement().readers([chunk.chunk_id.content_id for chunk in chunks])
        for chunk, members in zip(chunks, readers, strict=True):
            assert any(cluster.cells[member.node_id].has(chunk) for member in members)
        seen.add(joined.node.stats().chunks)
    took_s = time.monotonic() - began_s
    assert cluster.whole(chunks)
    assert joined.node.stats().chunks == len(moved)
    assert len(seen) > 3
    # Two nodes send, each without the last chunk's share of the time.
    by_sender = [cell.worker.counters()["repair_sent_bytes"] for cell in cluster.cells.values()]
    largest = max(len(chunk.data) for chunk in chunks)
    assert took_s > (max(by_sender) - largest) / 400e3


def test_a_change_of_the_membership_ends_the_walk(make_cluster: Callable[[int], Cluster]) -> None:
    cluster = make_cluster(1)
    slow = cluster.add("a", bytes_per_s=2e3)
    chunks = samples(40, frame_bytes=4000)
    cluster.store(chunks)
    cluster.add("b")
    cluster.tick()
    wait_for(lambda: slow.sent > 0)
    cluster.lose("b")
    began_s = time.monotonic()
    cluster.settle()
    # At this rate it would have gone on for several minutes.
    assert time.monotonic() - began_s < sum(len(chunk.data) for chunk in chunks) / 2e3 / 4
    assert slow.sent < 10
    assert slow.worker.counters()["repair_failed"] <= 1
    assert cluster.whole(chunks)


def test_a_full_node_is_not_given_again_what_it_evicted(make_cluster: Callable[[int], Cluster]) -> None:
    cluster = make_cluster(2)
    large = cluster.add("a", period_s=0.2)
    small = cluster.add("b", memory_bytes=512 << 10)
    chunks = samples(60)
    cluster.store(chunks)
    assert small.node.stats().counters["evictions"] > 0
    cluster.settle()
    sent, evictions = large.sent, small.node.stats().counters["evictions"]
    large.wait_for_walks(3)
    assert (large.sent, small.node.stats().counters["evictions"]) == (sent, evictions)


def test_what_was_stored_elsewhere_meanwhile_comes_to_its_owner(
    make_cluster: Callable[[int], Cluster],
) -> None:
    cluster = make_cluster(1)
    for name in ("a", "b"):
        cluster.add(name, period_s=0.2)
    cluster.settle()
    chunks = samples(20)
    for chunk, owners in zip(chunks, cluster.owners(chunks), strict=True):
        cluster.cells["b" if owners[0].node_id == "a" else "a"].put(chunk)
    wait_for(lambda: cluster.whole(chunks))


def test_a_silent_node_does_not_stop_the_others(make_cluster: Callable[[int], Cluster]) -> None:
    cluster = make_cluster(2)
    for name in ("a", "b", "c"):
        cluster.add(name)
    chunks = samples(40)
    # Nobody answers for d, and the coordinator has not noticed yet.
    cluster.store(chunks)
    cluster.coordinator.join(Member("d", "127.0.0.1:1"), 1)
    cluster.cells["a"].node.delete([chunk.chunk_id for chunk in chunks])
    cluster.tick()
    owned = [
        c
        for c, owners in zip(chunks, cluster.owners(chunks), strict=True)
        if "d" not in {m.node_id for m in owners}
    ]
    assert owned
    wait_for(lambda: cluster.whole(owned))
    assert not cluster.rested()


def test_stopping_does_not_wait_for_the_rate(make_cluster: Callable[[int], Cluster]) -> None:
    cluster = make_cluster(1)
    slow = cluster.add("a", bytes_per_s=50)
    chunks = samples(20)
    assert min(len(chunk.data) for chunk in chunks) / 50 > 60
    cluster.store(chunks)
    cluster.add("b")
    cluster.tick()
    wait_for(lambda: slow.sent > 0)
    began_s = time.monotonic()
    slow.worker.stop()
    assert time.monotonic() - began_s < 30
