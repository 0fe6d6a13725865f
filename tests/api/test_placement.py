import math
from collections import Counter

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from kvstore_api.placement import Member, owners

CONTENTS = [blake3(number.to_bytes(4, "little")).digest() for number in range(4000)]
KNOWN_OWNERS = [["node-3", "node-0"], ["node-3", "node-0"], ["node-0", "node-3"], ["node-2", "node-3"]]


def nodes(count: int) -> list[Member]:
    return [Member(f"node-{index}", f"127.0.0.1:{7000 + index}") for index in range(count)]


def test_known_answers() -> None:
    # These pin the wire contract: a client and a cluster of different releases must agree on every owner.
    ids = [[member.node_id for member in owners(content, nodes(5), 2)] for content in CONTENTS[:4]]
    assert ids == KNOWN_OWNERS


def test_every_node_gets_its_share() -> None:
    counts = Counter(owners(content, nodes(8))[0].node_id for content in CONTENTS)
    expected = len(CONTENTS) / 8
    spread = 5 * math.sqrt(expected)
    assert len(counts) == 8
    assert all(abs(count - expected) < spread for count in counts.values())


def test_weights_are_proportions() -> None:
    members = [Member("small", "a:1", 1.0), Member("large", "b:1", 3.0)]
    large = sum(owners(content, members)[0].node_id == "large" for content in CONTENTS)
    assert abs(large / len(CONTENTS) - 0.75) < 0.03


def test_a_leaving_node_moves_only_its_own_chunks() -> None:
    before, after = nodes(6), nodes(5)
    for content in CONTENTS:
        old, new = owners(content, before)[0], owners(content, after)[0]
        assert old.node_id == "node-5" or new == old


def test_a_joining_node_takes_only_its_share() -> None:
    moved = sum(owners(content, nodes(9))[0] != owners(content, nodes(8))[0] for content in CONTENTS)
    assert abs(moved / len(CONTENTS) - 1 / 9) < 0.03


def test_losing_the_first_owner_promotes_the_second() -> None:
    members = nodes(6)
    for content in CONTENTS[:200]:
        first, second = owners(content, members, 2)
        assert owners(content, [member for member in members if member != first])[0] == second


@given(st.permutations(nodes(7)), st.binary(min_size=32, max_size=32), st.integers(1, 9))
def test_order_and_endpoints_do_not_matter(members: list[Member], content: bytes, replicas: int) -> None:
    elsewhere = [Member(member.node_id, "elsewhere:1") for member in members]
    ids = [member.node_id for member in owners(content, nodes(7), replicas)]
    assert [member.node_id for member in owners(content, elsewhere, replicas)] == ids
    assert len(ids) == len(set(ids)) == min(replicas, 7)


def test_nobody_owns_anything_in_an_empty_cluster() -> None:
    assert owners(CONTENTS[0], []) == []


@pytest.mark.parametrize("weight", [0.0, -1.0, math.inf, math.nan])
def test_impossible_weights_are_refused(weight: float) -> None:
    with pytest.raises(ValueError, match="weight of node 'x'"):
        Member("x", "a:1", weight)
