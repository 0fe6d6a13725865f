"""Lookups that take a chunk's content in any context."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore_cluster.arena import Arena
from kvstore_cluster.disk import SegmentStore
from kvstore_cluster.leases import LeaseTable
from kvstore_cluster.lookup import LookupAnswer, LookupRequest
from kvstore_cluster.node import StorageNode
from kvstore_cluster.put import PutOptions
from kvstore_codec.identity import ROOT_PREFIX, PrefixId, prefix_id
from tests.clock import Clock
from tests.sample_chunk import SampleChunk, sample_chunk

EXACT = ["exact-zstd"]
UNKNOWN = 99


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def node(clock: Clock) -> Iterator[StorageNode]:
    node = StorageNode("node-0", Arena(1 << 20, 4 << 10), leases=LeaseTable(clock=clock), clock=clock)
    yield node
    node.check_integrity()


def put(node: StorageNode, chunk: SampleChunk, ttl_s: int = 0) -> None:
    pending = node.begin_put(chunk.chunk_id, chunk.encoding, len(chunk.data), options=PutOptions(ttl_s=ttl_s))
    assert pending is not None
    pending.write(memoryview(chunk.data))
    assert pending.commit()


def beginning(content: int) -> SampleChunk:
    """The content where it begins its text."""
    content_id = sample_chunk(content).chunk_id.content_id
    return sample_chunk(content, prefix_id=prefix_id(ROOT_PREFIX, content_id))


def look(
    node: StorageNode, chunk: SampleChunk, encodings: list[str] = EXACT, **options: bool
) -> LookupAnswer:
    (answer,) = node.lookup(LookupRequest([chunk.chunk_id], encodings, any_context=True, **options)).answers
    return answer


def context_of(answer: LookupAnswer) -> PrefixId:
    return PrefixId(answer.prefix_id)


def test_another_context_answers_only_when_it_may(node: StorageNode) -> None:
    stored, asked = sample_chunk(context=1), sample_chunk(context=2)
    put(node, stored)
    (exact_only,) = node.lookup(LookupRequest([asked.chunk_id], EXACT)).answers
    assert (exact_only.encoding, exact_only.prefix_id, exact_only.other_contexts) == (None, b"", 1)
    answer = look(node, asked)
    assert (answer.encoding, answer.size_bytes) == ("exact-zstd", len(stored.data))
    assert answer.header == stored.data[: stored.header.header_bytes]
    assert context_of(answer) == stored.chunk_id.prefix_id
    assert look(node, sample_chunk(content=5)) == LookupAnswer(None, 0, b"", 0)
    counters = node.stats().counters
    assert (counters["hits"], counters["approximate_hits"], counters["misses"]) == (1, 1, 2)


def test_the_asked_context_is_preferred_to_all_others(node: StorageNode) -> None:
    chunks = [sample_chunk(context=context) for context in range(4)]
    for chunk in chunks:
        put(node, chunk)
    for chunk in chunks:
        answer = look(node, chunk)
        assert (answer.prefix_id, answer.other_contexts) == (b"", 3)
        assert answer.header == chunk.data[: chunk.header.header_bytes]


def test_what_began_its_text_is_the_last_choice(node: StorageNode) -> None:
    put(node, beginning(0))
    asked = sample_chunk(context=UNKNOWN)
    assert context_of(look(node, asked)) == beginning(0).chunk_id.prefix_id
    put(node, sample_chunk(context=1))
    look(node, beginning(0))  # used last
    assert context_of(look(node, asked)) == sample_chunk(context=1).chunk_id.prefix_id


def test_of_several_the_one_used_last_answers(node: StorageNode) -> None:
    chunks = [sample_chunk(context=context) for context in range(3)]
    for chunk in chunks:
        put(node, chunk)
    asked = sample_chunk(context=UNKNOWN)
    assert context_of(look(node, asked)) == chunks[2].chunk_id.prefix_id
    node.lookup(LookupRequest([chunks[0].chunk_id], EXACT))
    node.lookup(LookupRequest([chunks[1].chunk_id], EXACT, peek=True))
    assert context_of(look(node, asked, peek=True)) == chunks[0].chunk_id.prefix_id
    with node.open(chunks[1].chunk_id, "exact-zstd"):
        assert context_of(look(node, asked)) == chunks[1].chunk_id.prefix_id
    node.delete([chunks[1].chunk_id])
    assert context_of(look(node, asked)) == chunks[0].chunk_id.prefix_id


def test_a_lease_covers_the_context_that_answers(node: StorageNode, clock: Clock) -> None:
    stored = sample_chunk(context=1, frame_bytes=20_000)
    put(node, stored)
    result = node.lookup(
        LookupRequest([sample_chunk(context=2).chunk_id], EXACT, any_context=True, lease_s=10.0)
    )
    assert result.lease_id is not None
    assert result.answers[0].prefix_id == stored.chunk_id.prefix_id
    for number in range(1, 20):
        put(node, sample_chunk(content=number, frame_bytes=20_000))
    assert node.stats().counters["evictions"] > 0
    assert look(node, stored, peek=True).encoding == "exact-zstd"
    assert node.release_lease(result.lease_id)
    for number in range(20, 40):
        put(node, sample_chunk(content=number, frame_bytes=20_000))
    assert look(node, stored, peek=True).encoding is None
    assert node.stats().leases == 0


def test_one_stored_chunk_answers_for_many_places(node: StorageNode) -> None:
    """A document that a prompt repeats."""
    stored = sample_chunk(context=0, frame_bytes=20_000)
    put(node, stored)
    asked = [sample_chunk(context=context).chunk_id for context in range(5)]
    result = node.lookup(LookupRequest(asked, EXACT, any_context=True, lease_s=10.0))
    assert [answer.prefix_id for answer in result.answers] == [b"", *[stored.chunk_id.prefix_id] * 4]
    assert result.lease_id is not None
    for number in range(1, 20):
        put(node, sample_chunk(content=number, frame_bytes=20_000))
    assert look(node, stored, peek=True).encoding == "exact-zstd"
    assert node.release_lease(result.lease_id)
    for number in range(20, 40):
        put(node, sample_chunk(content=number, frame_bytes=20_000))
    assert look(node, stored, peek=True).encoding is None


def test_another_context_is_named_in_its_own_encodings(node: StorageNode) -> None:
    put(node, sample_chunk(context=0, encoding="medium-raw"))
    put(node, sample_chunk(context=1, encoding="low-raw"))
    for encoding in ("exact-zstd", "high-zstd"):
        put(node, sample_chunk(context=2, encoding=encoding))
    put(node, sample_chunk(context=3, encoding="medium-raw"))
    asked = sample_chunk(context=UNKNOWN)
    answer = look(node, asked, ["high-zstd", "exact-zstd"], all_encodings=True)
    assert answer.encoding == "high-zstd"
    assert [other.encoding for other in answer.others] == ["exact-zstd"]
    named = sample_chunk(context=2, encoding="exact-zstd")
    assert answer.others[0].header == named.data[: named.header.header_bytes]
    assert context_of(answer) == named.chunk_id.prefix_id
    # The exact context is here, but in no encoding that will do.
    asked = sample_chunk(context=1)
    assert context_of(look(node, asked, ["exact-zstd"])) == named.chunk_id.prefix_id
    assert look(node, asked, ["low-raw", "exact-zstd"]).prefix_id == b""
    assert look(node, asked, ["high-raw"]).encoding is None


def test_a_context_whose_time_is_over_does_not_answer(node: StorageNode, clock: Clock) -> None:
    put(node, sample_chunk(context=0))
    put(node, sample_chunk(context=1), ttl_s=10)
    asked = sample_chunk(context=UNKNOWN)
    assert context_of(look(node, asked)) == sample_chunk(context=1).chunk_id.prefix_id
    clock.now_s += 11
    assert context_of(look(node, asked)) == sample_chunk(context=0).chunk_id.prefix_id


@pytest.fixture
def node_on_disk(tmp_path: Path) -> Iterator[StorageNode]:
    store = SegmentStore(tmp_path / "disk", 16 << 20, segment_bytes=1 << 20)
    node = StorageNode("node-0", Arena(1 << 20, 4 << 10), store=store)
    yield node
    node.check_integrity()
    node.close()


def test_memory_is_preferred_to_the_disk(node_on_disk: StorageNode) -> None:
    node = node_on_disk
    old = sample_chunk(context=0, frame_bytes=20_000)
    put(node, old)
    for number in range(1, 10):
        put(node, sample_chunk(content=number, frame_bytes=20_000))
    asked = sample_chunk(context=UNKNOWN)
    answer = look(node, asked)
    assert answer.on_disk
    assert answer.header == old.data[: old.header.header_bytes]
    put(node, sample_chunk(context=1, frame_bytes=20_000))
    node.lookup(LookupRequest([old.chunk_id], EXACT))  # used last
    answer = look(node, asked)
    assert not answer.on_disk
    assert context_of(answer) == sample_chunk(context=1).chunk_id.prefix_id


@settings(deadline=None)
@given(
    stored=st.lists(st.integers(0, 5), unique=True),
    began=st.booleans(),
    used=st.lists(st.integers(0, 5)),
    asked=st.integers(0, 7),
)
def test_the_choice_follows_the_rules(stored: list[int], began: bool, used: list[int], asked: int) -> None:
    node = StorageNode("node-0", Arena(4 << 20, 4 << 10))
    chunks = {context: sample_chunk(context=context, frame_bytes=100) for context in range(8)}
    order = [*stored]
    for context in stored:
        put(node, chunks[context])
    if began:
        put(node, beginning(0))
    for context in used:
        node.lookup(LookupRequest([chunks[context].chunk_id], EXACT))
        if context in order:
            order.remove(context)
            order.append(context)
    answer = look(node, chunks[asked])
    assert answer.other_contexts == len(stored) + began - (asked in stored)
    if asked in stored:
        assert answer.prefix_id == b""
    elif order:
        assert answer.prefix_id == chunks[order[-1]].chunk_id.prefix_id
    elif began:
        assert answer.prefix_id == beginning(0).chunk_id.prefix_id
    else:
        assert answer.encoding is None
    node.check_integrity()


def test_of_very_many_the_one_used_last_answers() -> None:
    node = StorageNode("node-0", Arena(16 << 20, 1 << 10))
    chunks = [sample_chunk(context=context, frame_bytes=10) for context in range(500)]
    for chunk in chunks:
        put(node, chunk)
    asked = sample_chunk(context=1000)
    for used in (0, 250, 499):
        node.lookup(LookupRequest([chunks[used].chunk_id], EXACT))
        answer = look(node, asked)
        assert (answer.other_contexts, answer.prefix_id) == (500, chunks[used].chunk_id.prefix_id)
