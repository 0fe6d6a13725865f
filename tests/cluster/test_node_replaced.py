"""A chunk that is stored anew, to stay longer or with another calibration, while others stand behind it."""

from collections.abc import Iterator
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore_cluster.node import StorageNode
from kvstore_codec.errors import TextTooLongError
from tests.cluster.texts import NAMES, ROOM, Path_, ask, begin, chunk_at, kept, new_node, put, text, there


@pytest.fixture(params=NAMES)
def node(request: pytest.FixtureRequest) -> Iterator[StorageNode]:
    node = new_node(request.param)
    yield node
    node.check_integrity()


EVENTS = st.lists(
    st.tuples(st.lists(st.integers(0, 1), min_size=1, max_size=8).map(tuple), st.booleans()),
    min_size=1,
    max_size=25,
)


@pytest.mark.parametrize("policy", NAMES)
def test_a_chunk_that_is_replaced_keeps_its_place_in_its_text(policy: str) -> None:
    node = new_node(policy)
    places = text(1, 5)
    for place in places:
        assert put(node, place, ttl_s=1000)
    for _ in range(6):
        ask(node, places)
    assert put(node, places[0])
    assert put(node, places[2])
    node.check_integrity()
    for other in range(2, 2 + 3 * ROOM):
        put(node, (other,))
        there_now = kept(node, places)
        assert there_now == "1" * there_now.count("1") + "0" * there_now.count("0")
    node.check_integrity()


def test_a_chunk_put_behind_one_that_is_replaced_meanwhile_stands_behind_the_new_one(
    node: StorageNode,
) -> None:
    first, second = text(1, 2)
    assert put(node, first, ttl_s=1000)
    pending = begin(node, second)
    assert pending is not None
    assert put(node, first)
    pending.write(chunk_at(second).data)
    assert pending.commit()
    (listed,) = (v for v in node.list()[0] if v.chunk_id == chunk_at(second).chunk_id)
    assert listed.behind == (chunk_at(first).chunk_id,)


def test_of_a_replaced_chunk_that_says_less_of_its_text_what_was_known_stays(node: StorageNode) -> None:
    places = text(1, 3)
    for place in places:
        assert put(node, place, ttl_s=1000)
    chunk = chunk_at(places[1])
    pending = node.begin_put(chunk.chunk_id, chunk.encoding, len(chunk.data))
    assert pending is not None
    pending.write(chunk.data)
    assert pending.commit()
    listed = {variant.chunk_id: variant for variant in node.list()[0]}
    assert listed[chunk.chunk_id].number == 1
    assert listed[chunk.chunk_id].behind == (chunk_at(places[0]).chunk_id,)
    last = listed[chunk_at(places[2]).chunk_id]
    assert last.behind == (chunk.chunk_id, chunk_at(places[0]).chunk_id)


@pytest.mark.parametrize("policy", NAMES)
@settings(max_examples=25, deadline=None)
@given(events=EVENTS)
def test_no_chunk_outlives_one_before_it_that_is_replaced(
    policy: str, events: list[tuple[Path_, bool]]
) -> None:
    """Whatever texts are asked for, and whichever of their chunks are put again to stay longer."""
    node = new_node(policy, room=6)
    known: set[Path_] = set()
    ttl_s = 1000.0
    for place, replaces in events:
        places = [place[:end] for end in range(1, len(place) + 1)]
        known.update(places)
        if replaces and there(node, place):
            ttl_s *= 4
            with suppress(TextTooLongError):  # there is no room for both at once
                put(node, place, ttl_s=ttl_s)
        else:
            ask(node, places, ttl_s=1000.0)
        node.check_integrity()
        stored = {known_place for known_place in known if there(node, known_place)}
        assert all(known_place[:-1] in stored for known_place in stored if len(known_place) > 1)
