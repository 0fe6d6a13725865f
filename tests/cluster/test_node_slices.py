"""A long lookup lets others in: it is answered in slices, between which the node's lock is free."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore_cluster import lookup, waiting_uses
from kvstore_cluster.arena import Arena
from kvstore_cluster.disk import SegmentStore
from kvstore_cluster.durability import Durability
from kvstore_cluster.leases import LeaseTable
from kvstore_cluster.lookup import LookupRequest
from kvstore_cluster.node import StorageNode
from kvstore_cluster.put import PutOptions
from kvstore_cluster.slices import SLICE_CHUNKS
from tests.sample_chunk import SampleChunk, sample_chunk

EXACT = ["exact-zstd"]
STORED = [sample_chunk(content=number, frame_bytes=10) for number in range(4)]
MISSING = sample_chunk(content=99)
# A stored chunk in each of four slices.
LONG = [chunk.chunk_id for stored in STORED for chunk in (stored, *[MISSING] * (SLICE_CHUNKS - 1))]


class GoneError(Exception):
    """What `proceed` raises in these tests."""


def put(node: StorageNode, chunk: SampleChunk, options: PutOptions = PutOptions()) -> None:  # noqa: B008
    pending = node.begin_put(chunk.chunk_id, chunk.encoding, len(chunk.data), options=options)
    assert pending is not None
    pending.write(memoryview(chunk.data))
    assert pending.commit()


@pytest.fixture
def node() -> Iterator[StorageNode]:
    node = StorageNode("node-0", Arena(1 << 20, 4 << 10))
    for chunk in STORED:
        put(node, chunk)
    yield node
    node.check_integrity()


def test_slices_answer_what_one_lookup_each_would(node: StorageNode) -> None:
    at_once = node.lookup(LookupRequest(LONG, EXACT))
    apart = [
        answer
        for chunk in LONG[:: SLICE_CHUNKS // 4]
        for answer in node.lookup(LookupRequest([chunk], EXACT)).answers
    ]
    assert at_once.answers[:: SLICE_CHUNKS // 4] == apart
    assert sum(answer.encoding is not None for answer in at_once.answers) == len(STORED)


def test_others_are_served_between_two_slices(node: StorageNode) -> None:
    def ask(header_bytes: int) -> None:
        # In another thread, because the lock lets its owner in.
        asking = threading.Thread(target=lambda: served.append(node.lookup(LookupRequest(LONG[:1], EXACT))))
        asking.start()
        asking.join(60)

    served: list[object] = []
    node.lookup(LookupRequest(LONG, EXACT), proceed=ask)
    assert len(served) == len(STORED) - 1


def test_one_lease_holds_what_all_slices_found(node: StorageNode) -> None:
    lease_id = node.lookup(LookupRequest(LONG, EXACT, lease_s=60)).lease_id
    assert node.stats().leases == 1
    filler = [sample_chunk(content=100 + number, frame_bytes=50_000) for number in range(3)]
    for chunk in filler:
        put(node, chunk)
    assert all(node.lookup(LookupRequest([chunk.chunk_id], EXACT)).answers[0].encoding for chunk in STORED)
    assert lease_id is not None
    assert node.release_lease(lease_id)
    assert not node.lookup(LookupRequest(LONG, EXACT, lease_s=0)).lease_id


def test_a_lease_that_ends_between_two_slices_is_followed_by_another(node: StorageNode) -> None:
    """Then the reply names the later one, and nothing stays leased for ever."""
    result = node.lookup(LookupRequest(LONG, EXACT, lease_s=1e-6))
    assert result.lease_id is not None
    assert node.stats().leases == 0


def test_a_lookup_beyond_what_may_be_leased_is_answered_without_a_lease() -> None:
    node = StorageNode("node-0", Arena(1 << 20, 4 << 10), leases=LeaseTable(max_leased=20))
    for chunk in STORED:
        put(node, chunk)
    names = [chunk.chunk_id for chunk in STORED]
    first, second = (node.lookup(LookupRequest(names, EXACT, lease_s=60, use_follows=True)) for _ in range(2))
    assert first.answers == second.answers
    assert first.lease_id is not None
    assert second.lease_id is None
    assert node.use(first.lease_id, b"\x01", 256)
    assert node.lookup(LookupRequest(names[:1], EXACT, lease_s=60)).lease_id is not None


def test_a_lookup_that_is_given_up_leases_nothing(node: StorageNode) -> None:
    def give_up(header_bytes: int) -> None:
        assert node.stats().leases == 1
        raise GoneError

    with pytest.raises(GoneError):
        node.lookup(LookupRequest(LONG, EXACT, lease_s=60), proceed=give_up)
    assert node.stats().leases == 0
    assert node.stats().counters["lookups"] == 0


def test_headers_beyond_a_limit_are_read_once_the_lookup_may_proceed(
    node: StorageNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once = node.lookup(LookupRequest([chunk.chunk_id for chunk in STORED] * 50, EXACT)).answers
    sizes: list[int] = []
    monkeypatch.setattr(lookup, "SMALL_HEADERS_BYTES", 2 * len(at_once[0].header))
    later = node.lookup(
        LookupRequest([chunk.chunk_id for chunk in STORED] * 50, EXACT), proceed=sizes.append
    ).answers
    assert later == at_once
    assert set(sizes) == {sum(len(answer.header) for answer in at_once)}
    assert not node._catalog._readers


def test_the_header_of_a_chunk_that_goes_before_it_was_read_is_answered(
    node: StorageNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lookup, "SMALL_HEADERS_BYTES", 0)
    names = [chunk.chunk_id for chunk in STORED]
    result = node.lookup(LookupRequest(names, EXACT, lease_s=60), proceed=lambda _: node.delete(names[1:]))
    headers = [chunk.data[: chunk.header.header_bytes] for chunk in STORED]
    assert [answer.header for answer in result.answers] == headers
    assert node.stats().chunks == 1
    assert not node._catalog._readers


@pytest.mark.parametrize("replaced", [False, True])
def test_a_chunk_that_goes_between_two_slices_does_no_harm(node: StorageNode, replaced: bool) -> None:
    """Its slot may even belong to another chunk when its use is counted."""

    def drop(header_bytes: int) -> None:
        if node.delete([STORED[0].chunk_id]) and replaced:
            put(node, sample_chunk(content=50, frame_bytes=10))

    result = node.lookup(LookupRequest(LONG, EXACT), proceed=drop)
    assert [answer.encoding for answer in result.answers[::SLICE_CHUNKS]] == EXACT * len(STORED)
    assert node.stats().counters["hits"] == len(STORED)
    assert node.stats().chunks == len(STORED) - 1 + replaced


def test_a_content_of_many_contexts_is_searched_once_a_slice(
    node: StorageNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    searched = []
    search = node._index.another_context

    def counted(*arguments):
        searched.append(arguments)
        return search(*arguments)

    monkeypatch.setattr(node._index, "another_context", counted)
    elsewhere = sample_chunk(content=0, context=7).chunk_id
    answers = node.lookup(LookupRequest([elsewhere] * (SLICE_CHUNKS + 1), EXACT, any_context=True)).answers
    assert {answer.prefix_id for answer in answers} == {STORED[0].chunk_id.prefix_id}
    assert len(searched) == 2
    assert node.stats().counters["approximate_hits"] == len(answers)


@pytest.mark.parametrize("after", ["a slice", "headers from the disk"])
def test_headers_on_disk_are_let_go_when_a_lookup_is_given_up(tmp_path: Path, after: str) -> None:
    durable = PutOptions(Durability.DURABLE)
    chunks = [sample_chunk(content=number, frame_bytes=10) for number in range(130)]
    node = StorageNode("node-0", Arena(1 << 20, 4 << 10), store=SegmentStore(tmp_path, 8 << 20))
    for chunk in chunks:
        put(node, chunk, durable)
    node.close()
    # Started again, it has all chunks on disk and no header in memory.
    node = StorageNode("node-0", Arena(1 << 20, 4 << 10), store=SegmentStore(tmp_path, 8 << 20))
    names = [chunk.chunk_id for chunk in chunks]
    if after == "a slice":
        names += [MISSING.chunk_id] * SLICE_CHUNKS

    def give_up(header_bytes: int) -> None:
        raise GoneError

    with pytest.raises(GoneError):
        node.lookup(LookupRequest(names, EXACT, lease_s=60), proceed=give_up)
    assert node.stats().leases == 0
    assert node.delete([chunk.chunk_id for chunk in chunks]) == len(chunks)
    node.check_integrity()
    assert not node._catalog._readers
    node.close()


def test_a_long_delete_reaches_every_chunk(node: StorageNode) -> None:
    assert node.delete(LONG) == len(STORED)
    assert node.stats().counters["deletes"] == len(STORED)
    assert node.stats().chunks == 0


def test_a_long_report_reaches_every_chunk(node: StorageNode, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = []
    monkeypatch.setattr(node._catalog, "report", lambda _, score: scores.append(score))
    node.report(LONG, [number / len(LONG) for number in range(len(LONG))])
    assert scores == [number / len(LONG) for number in range(0, len(LONG), SLICE_CHUNKS)]


def test_a_lease_that_ends_between_two_slices_names_no_chunk_that_came_since() -> None:
    """The slot of a chunk that was found in the first slice has another tenant's chunk by the end of the lookup."""
    now_s = 0.0
    node = StorageNode("node-0", Arena(1 << 20, 4 << 10), leases=LeaseTable(clock=lambda: now_s))
    first, last, other = STORED[:3]
    put(node, first)
    put(node, last)

    def meanwhile(_header_bytes: int) -> None:
        nonlocal now_s
        now_s += 1
        assert node.stats().leases == 0
        assert node.delete([first.chunk_id]) == 1
        node.maintain()
        put(node, other, PutOptions(tenant="other"))

    asked = [first.chunk_id, *[MISSING.chunk_id] * (SLICE_CHUNKS - 1), last.chunk_id]
    lease_id = node.lookup(
        LookupRequest(asked, EXACT, lease_s=0.1, use_follows=True), proceed=meanwhile
    ).lease_id
    assert lease_id is not None
    assert node.use(lease_id, b"\xff" * 300, 100)
    assert node.stats().counters["hits"] == 1
    held = node._leases.holds
    assert not held(slot_of(node, other))
    assert held(slot_of(node, last))


def slot_of(node: StorageNode, chunk: SampleChunk) -> int:
    (slot,) = node._index.variants(chunk.chunk_id)
    return slot


def test_a_lookup_tells_the_policies_a_bounded_number_of_uses(
    node: StorageNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Uses wait for the maintenance thread. Where it does not run, each lookup tells as many as it
    adds, not all of them."""
    waiting, most = node._catalog._touched, len(STORED) // 2
    monkeypatch.setattr(waiting_uses, "MOST_WAITING", most)
    told: list[int] = []
    touch = node._catalog._touch
    monkeypatch.setattr(node._catalog, "_touch", lambda slot: (told.append(slot), touch(slot)))
    wanted = [stored.chunk_id for stored in STORED]
    for _ in range(20):
        told.clear()
        node.lookup(LookupRequest(wanted, EXACT))
        assert len(told) <= len(wanted)
        assert len(waiting) <= most
    assert told


def test_uses_of_the_same_chunks_wait_as_one_where_many_do(
    node: StorageNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clients that look the same chunks up again and again pay nothing for the policies, which are told in the order of
    the last uses."""
    monkeypatch.setattr(waiting_uses, "MOST_WAITING", 4 * len(STORED))
    told: list[int] = []
    monkeypatch.setattr(node._catalog, "_touch", told.append)
    wanted = [stored.chunk_id for stored in STORED]
    for _ in range(20):
        node.lookup(LookupRequest(wanted, EXACT))
        node.lookup(LookupRequest(wanted[:3], EXACT))
    assert not told
    node.maintain()
    assert len(told) <= 2 * len(STORED)
    first_three = [slot_of(node, stored) for stored in STORED[:3]]
    assert told[-3:] == first_three[::-1]
    assert set(told) == {slot_of(node, stored) for stored in STORED}
