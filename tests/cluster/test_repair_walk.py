"""Who sends what to whom, for any cluster and any distribution of chunks over it."""

from collections import Counter
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from kvstore_api.placement import Member, Placement
from kvstore_cluster.repair import Outcome
from kvstore_cluster.repair.pace import Pace
from kvstore_cluster.repair.walk import Survey
from kvstore_cluster.stored import StoredVariant
from kvstore_codec.errors import NodeUnavailableError
from kvstore_codec.identity import ChunkId
from tests.sample_chunk import sample_chunk

IDS = [sample_chunk(number).chunk_id for number in range(12)]
ENCODINGS = ("exact-zstd", "exact-raw")
Held = dict[str, set[tuple[ChunkId, str]]]


class Network:
    """What each node has, as the others see it when they ask."""

    def __init__(self, held: Held, silent: set[str]) -> None:
        self.held = held
        self.silent = silent

    def lookup(self, member: Member, variants: Sequence[StoredVariant]) -> list[bool]:
        if member.node_id in self.silent:
            raise NodeUnavailableError(member.node_id)
        assert len({variant.encoding for variant in variants}) == 1
        return [(one.chunk_id, one.encoding) in self.held[member.node_id] for one in variants]

    def room_bytes(self, member: Member) -> int:
        raise AssertionError("a survey sends nothing")

    def push(self, member: Member, variants: Sequence[StoredVariant]) -> list[Outcome]:
        raise AssertionError("a survey sends nothing")

    def close(self) -> None: ...


@st.composite
def clusters(draw: st.DrawFn) -> tuple[list[Member], int, Held]:
    names = [f"node-{number}" for number in range(draw(st.integers(1, 6)))]
    members = [
        Member(name, f"{name}:1", draw(st.sampled_from((1.0, 3.0))), draining=draw(st.booleans()))
        for name in names
    ]
    variants = st.sets(st.tuples(st.sampled_from(IDS), st.sampled_from(ENCODINGS)))
    return members, draw(st.integers(1, 4)), {name: draw(variants) for name in names}


def sendings(
    members: list[Member], replicas: int, held: Held, silent: set[str]
) -> Counter[tuple[str, ChunkId, str]]:
    """How many nodes send each variant to each node, all looking at the same moment."""
    placement = Placement(members, replicas)
    sent: Counter[tuple[str, ChunkId, str]] = Counter()
    for name, variants in held.items():
        listed = [StoredVariant(chunk, encoding, 1000) for chunk, encoding in sorted(variants, key=str)]
        for need in Survey(name, placement, Network(held, silent)).page(listed).needs:
            for owner in need.owners:
                assert (need.variant.chunk_id, need.variant.encoding) not in held[owner.node_id]
                sent[owner.node_id, need.variant.chunk_id, need.variant.encoding] += 1
    return sent


@given(cluster=clusters())
def test_every_owner_gets_what_it_lacks_from_one_node(cluster: tuple[list[Member], int, Held]) -> None:
    members, replicas, held = cluster
    sent = sendings(members, replicas, held, silent=set())
    placement = Placement(members, replicas)
    for chunk, encoding in set().union(*held.values()):
        (owners,), (readers,) = (find([chunk.content_id]) for find in (placement.owners, placement.readers))
        holders = {name for name, variants in held.items() if (chunk, encoding) in variants}
        for owner in owners:
            senders = sent.pop((owner.node_id, chunk, encoding), 0)
            if owner.node_id in holders:
                assert senders == 0
            elif holders & {member.node_id for member in readers}:
                assert senders == 1
            else:  # only where no reader looks: better twice than not at all
                assert senders == len(holders)
    assert not sent


@given(cluster=clusters(), silent=st.sets(st.integers(0, 5)))
def test_nobody_sends_on_a_guess(cluster: tuple[list[Member], int, Held], silent: set[int]) -> None:
    members, replicas, held = cluster
    everything = sendings(members, replicas, held, silent=set())
    some = sendings(members, replicas, held, {f"node-{number}" for number in silent})
    assert some <= everything


@given(st.lists(st.integers(1, 100_000), max_size=40), st.sampled_from((1e4, 1e6)))
def test_bursts_are_short_and_lose_nothing(sizes: list[int], bytes_per_s: float) -> None:
    variants = [StoredVariant(IDS[0], "exact-raw", size_bytes) for size_bytes in sizes]
    bursts = list(Pace(bytes_per_s).bursts(variants))
    assert [variant for burst in bursts for variant in burst] == variants
    for burst in bursts:
        assert len(burst) == 1 or sum(variant.size_bytes for variant in burst) <= bytes_per_s / 20


def test_the_pace_is_kept_on_average() -> None:
    pace = Pace(1000.0)
    now_s = 5.0
    for _ in range(10):
        now_s += pace.wait_s(now_s)
        pace.sent(500, now_s)
    assert now_s == 5.0 + 9 * 0.5
    # Time that was not used is not saved up.
    now_s += 100
    assert pace.wait_s(now_s) == 0
    pace.sent(500, now_s)
    assert pace.wait_s(now_s) == 0.5
