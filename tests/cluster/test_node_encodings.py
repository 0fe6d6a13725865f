"""Lookups that name every encoding a chunk is stored in."""

import itertools
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore_cluster.arena import Arena
from kvstore_cluster.lookup import LookupRequest
from kvstore_cluster.node import StorageNode
from kvstore_codec.errors import StorageError
from tests.sample_chunk import SampleChunk, sample_chunk

NAMES = ["exact-zstd", "exact-raw", "high-zstd", "medium-raw", "step0.5-zstd"]


def put(node: StorageNode, chunk: SampleChunk) -> None:
    pending = node.begin_put(chunk.chunk_id, chunk.encoding, len(chunk.data))
    assert pending is not None
    pending.write(memoryview(chunk.data))
    assert pending.commit()


@pytest.fixture
def node() -> Iterator[StorageNode]:
    node = StorageNode("node-0", Arena(1 << 20, 4 << 10))
    yield node
    node.check_integrity()


@given(
    stored=st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 1), st.sampled_from(NAMES)), unique=True, max_size=20
    ),
    asked=st.lists(st.sampled_from([*NAMES, "low-raw"]), unique=True),
)
def test_every_stored_encoding_that_was_asked_for_is_named_in_that_order(
    stored: list[tuple[int, int, str]], asked: list[str]
) -> None:
    node = StorageNode("node-0", Arena(4 << 20, 4 << 10))
    chunks = {key: sample_chunk(*key, frame_bytes=100) for key in stored}
    for chunk in chunks.values():
        put(node, chunk)
    ids = [sample_chunk(content).chunk_id for content in range(4)]
    answers = node.lookup(LookupRequest(ids, asked, all_encodings=True)).answers
    for content, answer in enumerate(answers):
        mine = {
            name: chunk
            for (number, context, name), chunk in chunks.items()
            if (number, context) == (content, 0)
        }
        named = [answer.encoding, *(other.encoding for other in answer.others)] if answer.encoding else []
        if asked:
            assert named == [name for name in asked if name in mine]
        else:
            assert sorted(named) == sorted(mine)
        found = [(answer.encoding, answer.header, answer.size_bytes)] if answer.encoding else []
        for name, header, size_bytes in found + [(o.encoding, o.header, o.size_bytes) for o in answer.others]:
            chunk = mine[name]
            assert header == chunk.data[: chunk.header.header_bytes]
            assert size_bytes == len(chunk.data)
    first_only = node.lookup(LookupRequest(ids, asked)).answers
    assert not any(answer.others for answer in first_only)
    if asked:
        assert [a._replace(others=()) for a in answers] == [a._replace(others=()) for a in first_only]


def test_one_lease_covers_all_and_a_chunk_is_counted_once(node: StorageNode) -> None:
    variants = [sample_chunk(encoding=name, frame_bytes=6000) for name in NAMES[:3]]
    for chunk in variants:
        put(node, chunk)
    result = node.lookup(LookupRequest([variants[0].chunk_id], [], lease_s=60.0, all_encodings=True))
    assert result.lease_id is not None
    counters = node.stats().counters
    assert (counters["lookups"], counters["hits"], counters["misses"]) == (1, 1, 0)
    for content in range(1, 20):  # more than there is memory for
        put(node, sample_chunk(content, frame_bytes=6000))
    assert node.stats().counters["evictions"] > 0
    (answer,) = node.lookup(
        LookupRequest([variants[0].chunk_id], NAMES, all_encodings=True, peek=True)
    ).answers
    assert len(answer.others) == 2
    assert node.stats().counters["hits"] == 1


@pytest.mark.parametrize(("peek", "survives"), [(False, True), (True, False)])
def test_all_encodings_are_used_unless_it_is_a_peek(node: StorageNode, peek: bool, survives: bool) -> None:
    variants = [sample_chunk(encoding=name, frame_bytes=6000) for name in NAMES[:3]]
    for chunk in variants:
        put(node, chunk)
    content = 0
    while not node.stats().counters["evictions"]:
        if content == 1:
            node.lookup(LookupRequest([variants[0].chunk_id], NAMES, all_encodings=True, peek=peek))
        content += 1
        put(node, sample_chunk(content, frame_bytes=6000))
    (answer,) = node.lookup(
        LookupRequest([variants[0].chunk_id], NAMES, all_encodings=True, peek=True)
    ).answers
    assert (len(answer.others) == 2) is survives


def test_further_encodings_are_left_out_where_their_headers_do_not_fit(node: StorageNode) -> None:
    stored = [[sample_chunk(content, encoding=name) for name in NAMES[:3]] for content in range(4)]
    for chunk in itertools.chain(*stored):
        put(node, chunk)
    ids = [variants[0].chunk_id for variants in stored]
    own = sum(variants[0].header.header_bytes for variants in stored)
    room = 2 * sum(
        chunk.header.header_bytes + 128 for chunk in stored[0][1:]
    )  # for those of two chunks, about
    result = node.lookup(
        LookupRequest(ids, NAMES, max_header_bytes=own + room, lease_s=60.0, all_encodings=True)
    )
    assert [len(answer.others) for answer in result.answers] == [2, 2, 0, 0]
    assert [answer.encoding for answer in result.answers] == [NAMES[0]] * 4
    with pytest.raises(StorageError, match="look fewer chunks up"):
        node.lookup(LookupRequest(ids, NAMES, max_header_bytes=own - 1, lease_s=60.0, all_encodings=True))
    assert node.stats().leases == 1
