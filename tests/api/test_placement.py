import math
from collections import Counter
from dataclasses import replace

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from kvstore_api.placement import Member, Placement, owners

CONTENTS = [blake3(number.to_bytes(4, "little")).digest() for number in range(4000)]
KNOWN_OWNERS = [["node-4", "node-2"], ["node-2", "node-3"], ["node-4", "node-2"], ["node-0", "node-3"]]
KNOWN_WEIGHTED_OWNERS = [
    ["node-4", "node-2"],
    ["node-3", "node-2"],
    ["node-4", "node-2"],
    ["node-3", "node-2"],
]


def nodes(count: int) -> list[Member]:
    return [Member(f"node-{index}", f"127.0.0.1:{7000 + index}") for index in range(count)]


def test_known_answers() -> None:
    # These pin the wire contract: a client and a cluster of different releases must agree on every owner.
    ids = [[member.node_id for member in owners(content, nodes(5), 2)] for content in CONTENTS[:4]]
    assert ids == KNOWN_OWNERS
    weighted = [replace(member, weight=1.0 + i) for i, member in enumerate(nodes(5))]
    ids = [[member.node_id for member in owners(content, weighted, 2)] for content in CONTENTS[:4]]
    assert ids == KNOWN_WEIGHTED_OWNERS


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


weights = st.sampled_from([1.0, 2.5, 4.0])
members_of_clusters = st.lists(
    st.builds(
        Member,
        node_id=st.integers(0, 99).map("node-{}".format),
        endpoint=st.just("a:1"),
        weight=weights,
        domain=st.sampled_from(["", "rack-1", "rack-2", "rack-3"]),
        draining=st.booleans(),
    ),
    max_size=8,
    unique_by=lambda member: member.node_id,
)


@given(members_of_clusters, st.integers(1, 4))
def test_owners_are_live_and_fail_apart(members: list[Member], replicas: int) -> None:
    live = [member for member in members if not member.draining]
    domains = {member.domain or member.node_id for member in live}
    for owned in Placement(members, replicas).owners(CONTENTS[:20]):
        assert set(owned) <= set(live)
        assert len(set(owned)) == len(owned) == min(replicas, len(live))
        assert len({member.domain or member.node_id for member in owned}) == min(replicas, len(domains))


@given(members_of_clusters, st.integers(1, 3), st.data())
def test_readers_find_what_lay_before_a_change(
    members: list[Member], replicas: int, data: st.DataObject
) -> None:
    """After one member joined, came back, or began to drain, every owner of before is still asked."""
    now = Placement(members, replicas)
    readers = now.readers(CONTENTS[:20])
    assert [row[: len(owned)] for row, owned in zip(readers, now.owners(CONTENTS[:20]), strict=True)] == (
        now.owners(CONTENTS[:20])
    )
    if not members:
        return
    changed = data.draw(st.sampled_from(members))
    before = [member for member in members if member != changed]
    if changed.draining:
        before = [replace(member, draining=False) if member.draining else member for member in members]
    for row, owned in zip(readers, Placement(before, replicas).owners(CONTENTS[:20]), strict=True):
        assert {member.node_id for member in owned} <= {member.node_id for member in row}
        assert len(set(row)) == len(row)


def test_placement_of_many_is_that_of_each() -> None:
    members = [
        replace(member, weight=1.0 + i % 3, domain=f"rack-{i % 4}") for i, member in enumerate(nodes(300))
    ]
    placed = Placement(members, 3).owners(CONTENTS[:500])
    assert placed[::50] == [tuple(owners(content, members, 3)) for content in CONTENTS[:500:50]]


@pytest.mark.parametrize("heaviest", [1, 4])
def test_a_hundred_nodes_are_loaded_evenly(heaviest: int) -> None:
    """Without virtual nodes: 1,800 chunks a node differ by chance alone, about 2.5 standard deviations at most."""
    contents = [blake3(number.to_bytes(4, "little")).digest() for number in range(180_000)]
    members = [replace(member, weight=1.0 + i % heaviest) for i, member in enumerate(nodes(100))]
    before = Placement(members).owners(contents)
    counts = Counter(owned[0].node_id for owned in before)
    mean = len(contents) / sum(member.weight for member in members)
    assert max(counts[member.node_id] / (mean * member.weight) for member in members) <= 1.10
    after = Placement([*members, Member("joined", "b:1")]).owners(contents)
    moved = [new for old, new in zip(before, after, strict=True) if new != old]
    assert all(new[0].node_id == "joined" for new in moved)
    assert len(moved) / len(contents) <= 1.1 / 101


@pytest.mark.parametrize("domains", [0, 3])
@pytest.mark.parametrize("replicas", [1, 2])
def test_two_that_join_together_hide_nothing(replicas: int, domains: int) -> None:
    members = [replace(m, domain=f"rack-{i % domains}" if domains else "") for i, m in enumerate(nodes(6))]
    before = Placement(members[:4], replicas).owners(CONTENTS)
    for owned, row in zip(before, Placement(members, replicas).readers(CONTENTS), strict=True):
        assert not set(owned).isdisjoint(row)
