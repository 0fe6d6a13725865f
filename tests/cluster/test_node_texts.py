"""What a node keeps of a text: its beginning, whatever the policy."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore_cluster.disk import SegmentStore
from kvstore_cluster.lookup import LookupRequest
from kvstore_cluster.node import StorageNode
from kvstore_cluster.put import PutOptions
from kvstore_codec.errors import ArenaFullError, TextTooLongError
from tests.cluster.texts import EXACT, NAMES, ROOM, Path_, ask, chunk_at, kept, new_node, put, text, there


@pytest.fixture(params=NAMES)
def node(request: pytest.FixtureRequest) -> Iterator[StorageNode]:
    node = new_node(request.param)
    yield node
    node.check_integrity()


def test_of_a_text_beyond_memory_the_beginning_stays(node: StorageNode) -> None:
    long = text(1, ROOM + 4)
    assert ask(node, long) == 0
    assert kept(node, long) == "1" * ROOM + "0" * 4
    for _ in range(3):
        assert ask(node, long) == ROOM
    assert node.stats().counters["evictions"] == 0
    assert node.stats().counters["texts_cut"] == 4


def test_a_refusal_says_why_and_holds_for_what_follows(node: StorageNode) -> None:
    long = text(1, ROOM + 3)
    for place in long[:ROOM]:
        assert put(node, place)
    with pytest.raises(TextTooLongError, match="keeps the beginning of a text"):
        put(node, long[ROOM])
    with pytest.raises(TextTooLongError, match="has just refused the chunk before it"):
        put(node, long[ROOM + 1])
    assert kept(node, long) == "1" * ROOM + "000"


def test_a_new_text_gets_room_from_one_that_was_used_often(node: StorageNode) -> None:
    often, new = text(1, ROOM), text(2, 5)
    for _ in range(6):
        ask(node, often)
    ask(node, new)
    assert kept(node, new) == "1" * len(new)
    assert kept(node, often) == "1" * (ROOM - len(new)) + "0" * len(new)


def test_another_text_takes_the_room_from_the_end_of_the_one_before(node: StorageNode) -> None:
    old, new = text(1, ROOM), text(2, 3)
    ask(node, old)
    ask(node, new)
    assert kept(node, new) == "111"
    assert kept(node, old) == "1" * (ROOM - 3) + "000"


def test_a_lookup_that_gives_nothing_keeps_nothing(node: StorageNode) -> None:
    """A text whose first chunk is gone: what is left of it is found and is of no use."""
    long, short = text(1, ROOM), text(2, 5)
    ask(node, long)
    node.delete([chunk_at(long[0]).chunk_id])
    before = node.stats().counters
    for _ in range(5):
        result = node.lookup(
            LookupRequest([chunk_at(place).chunk_id for place in long], EXACT, lease_s=9, use_follows=True)
        )
        assert result.lease_id is not None
        assert node.stats().leases == 1
        assert node.use(result.lease_id, bytes(2), 0)
        assert node.stats().leases == 0
    counters = node.stats().counters
    assert counters["hits"] == before["hits"]
    assert counters["unusable"] - before["unusable"] == 5 * (ROOM - 1)
    ask(node, short)
    assert kept(node, short) == "11111"


def test_use_is_counted_once_and_in_tokens(node: StorageNode) -> None:
    places = text(1, 5)
    ask(node, places)
    result = node.lookup(
        LookupRequest([chunk_at(place).chunk_id for place in places], EXACT, lease_s=9, use_follows=True)
    )
    assert result.lease_id is not None
    assert node.stats().counters["hits"] == 0
    assert node.use(result.lease_id, b"\x07", 3 * 256)
    assert not node.use(result.lease_id, b"\x1f", 5 * 256)
    counters = node.stats().counters
    assert (counters["hits"], counters["hit_tokens"], counters["unusable"]) == (3, 768, 2)
    assert node.release_lease(result.lease_id)
    counted = node.lookup(LookupRequest([chunk_at(places[0]).chunk_id], EXACT, lease_s=9)).lease_id
    assert counted is not None
    assert not node.use(counted, b"\xff", 1)
    assert node.stats().counters["hits"] == 4
    node.release_lease(counted)


def test_a_claim_of_more_than_was_found_is_bounded(node: StorageNode) -> None:
    ask(node, text(1, 2))
    ids = [chunk_at(place).chunk_id for place in text(1, 3)]
    lease_id = node.lookup(LookupRequest(ids, EXACT, lease_s=9, use_follows=True)).lease_id
    assert lease_id is not None
    assert node.use(lease_id, b"\xff" * 100, 1 << 60)
    counters = node.stats().counters
    assert counters["hits"] == 2
    assert counters["hit_tokens"] <= 2 << 16
    node.release_lease(lease_id)


def test_the_lease_ends_on_what_cannot_be_used(node: StorageNode) -> None:
    places = text(1, ROOM)
    ask(node, places)
    lease_id = node.lookup(
        LookupRequest([chunk_at(place).chunk_id for place in places], EXACT, lease_s=9, use_follows=True)
    ).lease_id
    assert lease_id is not None
    with pytest.raises(ArenaFullError):
        put(node, (2,))
    assert node.use(lease_id, b"\x0f\x00", 4 * 256)
    for other in range(2, 2 + ROOM - 4):
        assert put(node, (other,))
    assert kept(node, places) == "1111" + "0" * (ROOM - 4)


def test_a_leased_chunk_keeps_those_before_it(node: StorageNode) -> None:
    places = text(1, 5)
    ask(node, places)
    lease_id = node.lookup(LookupRequest([chunk_at(places[3]).chunk_id], EXACT, lease_s=9)).lease_id
    assert lease_id is not None
    for other in range(2, 30):
        put(node, (other,))
    assert kept(node, places) == "11110"


def test_chunks_of_another_tenant_are_not_held_by_a_text(node: StorageNode) -> None:
    """A client that puts a chunk behind another tenant's does not keep that one from leaving."""
    assert put(node, (1,), tenant="a")
    assert put(node, (1, 0), tenant="b")
    for _ in range(20):
        node.lookup(LookupRequest([chunk_at((1, 0)).chunk_id], EXACT))
        for other in range(2, 2 + ROOM):
            put(node, (other,))
    assert not there(node, (1,))


def test_lies_about_the_order_make_no_circle(node: StorageNode) -> None:
    """Each of two chunks says that it stands behind the other: both can leave."""
    first, second = chunk_at((1,)), chunk_at((2,))
    for chunk, other, number in (
        (first, second, 5),
        (second, first, 7),
        (first, second, 9),
        (second, second, 9),
    ):
        options = PutOptions(number=number, behind=(other.chunk_id,))
        pending = node.begin_put(chunk.chunk_id, chunk.encoding, len(chunk.data), options=options)
        if pending is not None:
            pending.write(chunk.data)
            pending.commit()
        node.check_integrity()
    for number in range(3, 3 + 3 * ROOM):
        put(node, (number,))
    assert kept(node, [(1,), (2,)]) == "00"


def test_of_a_text_beyond_its_quota_the_beginning_stays(node: StorageNode) -> None:
    size_bytes = max(len(chunk_at((7, *[0] * number)).data) for number in range(8))
    node.set_quotas({"small": 4 * size_bytes + 10})
    places = text(7, 8)
    for place in places[:4]:
        assert put(node, place, tenant="small")
    for _ in range(2):
        with pytest.raises(TextTooLongError, match="Raise the quota"):
            put(node, places[4], tenant="small")
    assert kept(node, places) == "11110000"
    assert put(node, (8,), tenant="small")
    assert kept(node, places) == "11100000"
    node.check_integrity()


TREES = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=14).map(tuple), min_size=1, max_size=25)


@pytest.mark.parametrize("policy", NAMES)
@settings(max_examples=25, deadline=None)
@given(asked=TREES, pinned=st.sets(st.integers(0, 24), max_size=2))
def test_no_chunk_outlives_one_before_it(policy: str, asked: list[Path_], pinned: set[int]) -> None:
    """Whatever texts are asked for, what a node has of them is beginnings."""
    node = new_node(policy, room=6)
    node.set_pins({"": {chunk_at(asked[number]).chunk_id for number in pinned if number < len(asked)}})
    known: set[Path_] = set()
    for place in asked:
        places = [place[:end] for end in range(1, len(place) + 1)]
        known.update(places)
        try:
            ask(node, places)
        except ArenaFullError:
            assert pinned
        node.check_integrity()
        stored = {known_place for known_place in known if there(node, known_place)}
        assert all(known_place[:-1] in stored for known_place in stored if len(known_place) > 1)
        if not pinned:
            assert places[0] in stored


@pytest.mark.parametrize("policy", NAMES)
def test_memory_above_a_disk_keeps_beginnings_too(policy: str, tmp_path: Path) -> None:
    store = SegmentStore(tmp_path / "disk", 64 << 20, segment_bytes=1 << 20)
    node = new_node(policy, store=store)
    places = text(1, 3 * ROOM)
    for _ in range(2):
        ask(node, places)
        for place in places:
            with node.open(chunk_at(place).chunk_id, "exact-zstd") as reader:
                assert b"".join(v for p in reader.pieces(0, 0, 1 << 20) for v in p) == chunk_at(place).data
    answers = node.lookup(
        LookupRequest([chunk_at(place).chunk_id for place in places], EXACT, peek=True)
    ).answers
    in_memory = [number for number, answer in enumerate(answers) if not answer.on_disk]
    assert in_memory[: ROOM - 2] == list(range(ROOM - 2))
    node.check_integrity()
    node.close()


@pytest.mark.parametrize("policy", NAMES)
def test_a_full_disk_keeps_beginnings_also_after_a_restart(policy: str, tmp_path: Path) -> None:
    def opened() -> StorageNode:
        store = SegmentStore(tmp_path / "disk", 3 << 20, segment_bytes=256 << 10)
        return new_node(policy, room=3, store=store)

    node = opened()
    old = text(1, 12)
    ask(node, old)
    node.close()
    node = opened()
    node.check_integrity()
    assert kept(node, old) == "1" * 12
    new = text(2, 24)
    ask(node, new)
    node.check_integrity()
    there_now = kept(node, old)
    assert there_now == "1" * there_now.count("1") + "0" * there_now.count("0")
    assert there_now.count("1") < 12
    assert node.stats().counters["evictions"] > 0
    node.close()
