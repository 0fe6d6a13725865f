import dataclasses
from collections.abc import Callable

import pytest

from kvstore_cluster.arena import Arena
from kvstore_cluster.leases import LeaseTable
from kvstore_cluster.lookup import LookupRequest
from kvstore_cluster.node import StorageNode
from kvstore_codec.errors import (
    ArenaFullError,
    ChecksumError,
    ChunkFormatError,
    ChunkNotFoundError,
    ChunkTooLargeError,
    ForeignChunkError,
    FrameRangeError,
    PutStateError,
    TruncatedChunkError,
    UnknownEncodingError,
)
from tests.clock import Clock
from tests.sample_chunk import SampleChunk, sample_chunk

MEMORY = 1 << 20
BLOCK = 4 << 10
EXACT = ["exact-zstd"]


@pytest.fixture
def clock() -> Clock:
    return Clock(0.0)


@pytest.fixture
def node(clock: Clock):
    node = StorageNode("node-0", Arena(MEMORY, BLOCK), leases=LeaseTable(clock=clock))
    yield node
    node.check_integrity()


def put(node: StorageNode, chunk: SampleChunk, piece_bytes: int = 3001) -> bool:
    pending = node.begin_put(chunk.chunk_id, chunk.encoding, len(chunk.data))
    if pending is None:
        return False
    for start in range(0, len(chunk.data), piece_bytes):
        pending.write(memoryview(chunk.data)[start : start + piece_bytes])
    return pending.commit()


def read(node: StorageNode, chunk: SampleChunk, first: int, count: int, piece_bytes: int = 2500) -> bytes:
    with node.open(chunk.chunk_id, chunk.encoding) as reader:
        pieces = [b"".join(views) for views in reader.pieces(first, count, piece_bytes)]
    assert all(len(piece) == piece_bytes for piece in pieces[:-1])
    return b"".join(pieces)


def stored(node: StorageNode, chunk: SampleChunk) -> bool:
    return node.lookup(LookupRequest([chunk.chunk_id], [chunk.encoding])).answers[0].encoding is not None


def fill(node: StorageNode, frame_bytes: int = 6000) -> list[SampleChunk]:
    """Puts chunks until the first had to go, and returns all of them."""
    chunks = []
    while not node.stats().counters["evictions"]:
        chunks.append(sample_chunk(content=len(chunks), frame_bytes=frame_bytes))
        put(node, chunks[-1])
    return chunks


def test_what_was_put_is_found_and_read(node: StorageNode) -> None:
    chunk = sample_chunk()
    assert put(node, chunk)
    (answer,) = node.lookup(LookupRequest([chunk.chunk_id], EXACT)).answers
    assert (answer.encoding, answer.size_bytes, answer.other_contexts) == ("exact-zstd", len(chunk.data), 0)
    assert answer.header == chunk.data[: chunk.header.header_bytes]
    frames = chunk.header.geometry.frame_count
    for first, count in [(0, 1), (0, frames), (3, 2), (frames - 1, 1)]:
        assert read(node, chunk, first, count) == chunk.frames(first, count)


def test_a_chunk_is_invisible_until_committed(node: StorageNode) -> None:
    chunk = sample_chunk()
    pending = node.begin_put(chunk.chunk_id, chunk.encoding, len(chunk.data))
    assert pending is not None
    pending.write(chunk.data)
    assert not stored(node, chunk)
    assert pending.commit()
    assert stored(node, chunk)


def test_a_revoked_put_leaves_nothing(node: StorageNode) -> None:
    chunk = sample_chunk()
    pending = node.begin_put(chunk.chunk_id, chunk.encoding, len(chunk.data))
    assert pending is not None
    pending.write(chunk.data[:500])
    assert node.stats().bytes_used > 0
    pending.revoke()
    pending.revoke()
    assert node.stats().bytes_used == 0
    with pytest.raises(PutStateError, match="has ended"):
        pending.write(b"more")
    with pytest.raises(PutStateError, match="has ended"):
        pending.commit()


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (lambda data: data[:-1] + bytes([data[-1] ^ 1]), ChecksumError),
        (lambda data: data[:40] + bytes([data[40] ^ 64]) + data[41:], ChunkFormatError),
        (lambda data: data[:-7], TruncatedChunkError),
        (lambda data: data + b"tail", ChunkFormatError),
        (lambda data: data[:1], ChunkFormatError),
        (lambda data: bytes(len(data)), ChunkFormatError),
    ],
)
def test_unsound_bytes_are_never_stored(
    node: StorageNode, spoil: Callable[[bytes], bytes], error: type[Exception]
) -> None:
    chunk = sample_chunk()
    other = sample_chunk(content=1)
    put(node, other)
    used = node.stats().bytes_used
    with pytest.raises(error):
        put(node, dataclasses.replace(chunk, data=spoil(chunk.data)))
    assert not stored(node, chunk)
    assert stored(node, other)
    assert node.stats().bytes_used == used
    assert node.stats().counters["put_rejected"] == 1


def test_a_chunk_under_a_foreign_name_is_refused(node: StorageNode) -> None:
    chunk = sample_chunk()
    for lie in [
        dataclasses.replace(chunk, chunk_id=sample_chunk(content=1).chunk_id),
        dataclasses.replace(chunk, chunk_id=sample_chunk(context=1).chunk_id),
        dataclasses.replace(chunk, encoding="high-zstd"),
    ]:
        with pytest.raises(ForeignChunkError, match="announced as"):
            put(node, lie)
    assert node.stats().chunks == 0


def test_a_size_that_is_not_kept_is_refused(node: StorageNode) -> None:
    chunk = sample_chunk()
    pending = node.begin_put(chunk.chunk_id, chunk.encoding, len(chunk.data))
    assert pending is not None
    pending.write(chunk.data)
    with pytest.raises(PutStateError, match="has more"):
        pending.write(b"x")
    assert pending.commit()
    short = sample_chunk(content=1)
    pending = node.begin_put(short.chunk_id, short.encoding, len(short.data))
    assert pending is not None
    pending.write(short.data[:-1])
    with pytest.raises(
        PutStateError, match=f"size of {len(short.data)} bytes, but has {len(short.data) - 1}"
    ):
        pending.commit()


def test_impossible_puts_are_refused_at_the_start(node: StorageNode) -> None:
    chunk_id = sample_chunk().chunk_id
    with pytest.raises(ChunkTooLargeError, match="more memory"):
        node.begin_put(chunk_id, "exact-zstd", MEMORY + 1)
    with pytest.raises(PutStateError, match="announced with a size of 0 bytes"):
        node.begin_put(chunk_id, "exact-zstd", 0)
    with pytest.raises(UnknownEncodingError):
        node.begin_put(chunk_id, "exact-magic", 100)
    assert node.stats().counters["put_rejected"] == 3


def test_of_two_puts_of_one_chunk_the_first_commit_wins(node: StorageNode) -> None:
    chunk = sample_chunk()
    first = node.begin_put(chunk.chunk_id, chunk.encoding, len(chunk.data))
    second = node.begin_put(chunk.chunk_id, chunk.encoding, len(chunk.data))
    assert first is not None
    assert second is not None
    first.write(chunk.data)
    second.write(chunk.data)
    assert second.commit()
    assert not first.commit()
    assert node.begin_put(chunk.chunk_id, chunk.encoding, len(chunk.data)) is None
    assert node.stats().chunks == 1
    assert read(node, chunk, 0, 4) == chunk.frames(0, 4)


def test_lookup_tells_exact_from_approximate_and_prefers_the_callers_order(node: StorageNode) -> None:
    exact, high, elsewhere = sample_chunk(), sample_chunk(encoding="high-zstd"), sample_chunk(context=1)
    for chunk in (exact, high, elsewhere):
        put(node, chunk)
    unknown = sample_chunk(context=2).chunk_id
    answers = node.lookup(
        LookupRequest([exact.chunk_id, elsewhere.chunk_id, unknown], ["high-zstd", "exact-zstd"])
    ).answers
    assert [answer.encoding for answer in answers] == ["high-zstd", "exact-zstd", None]
    assert [answer.other_contexts for answer in answers] == [1, 1, 2]
    assert node.lookup(LookupRequest([exact.chunk_id], EXACT)).answers[0].encoding == "exact-zstd"
    assert node.lookup(LookupRequest([exact.chunk_id], [])).answers[0].encoding is None
    counters = node.stats().counters
    assert (counters["lookups"], counters["hits"], counters["misses"]) == (3, 3, 2)


def test_what_was_used_longest_ago_is_evicted(node: StorageNode) -> None:
    chunks = fill(node)
    assert not stored(node, chunks[0])
    assert stored(node, chunks[1])  # and thereby used
    put(node, sample_chunk(content=1000, frame_bytes=6000))
    assert stored(node, chunks[1])
    assert not stored(node, chunks[2])


def test_a_lease_protects_until_it_ends(node: StorageNode, clock: Clock) -> None:
    chunks = fill(node)[1:]
    result = node.lookup(LookupRequest([chunk.chunk_id for chunk in chunks], EXACT, lease_s=10.0))
    assert result.lease_id is not None
    newcomer = sample_chunk(content=1000, frame_bytes=6000)
    evictions = node.stats().counters["evictions"]
    with pytest.raises(ArenaFullError, match="leased"):
        put(node, newcomer)
    assert node.stats().counters["evictions"] == evictions
    clock.now_s += 8.0
    assert node.renew_lease(result.lease_id, 10.0)
    clock.now_s += 8.0
    with pytest.raises(ArenaFullError):
        put(node, newcomer)
    clock.now_s += 3.0
    assert put(node, newcomer)
    assert not node.release_lease(result.lease_id)


def test_a_released_lease_protects_no_longer(node: StorageNode) -> None:
    chunks = fill(node)[1:]
    lease_id = node.lookup(LookupRequest([chunk.chunk_id for chunk in chunks], EXACT, lease_s=10.0)).lease_id
    assert lease_id is not None
    assert node.stats().leases == 1
    assert node.release_lease(lease_id)
    assert put(node, sample_chunk(content=1000, frame_bytes=6000))


def test_no_lease_is_taken_over_nothing(node: StorageNode) -> None:
    assert node.lookup(LookupRequest([sample_chunk().chunk_id], EXACT, lease_s=10.0)).lease_id is None
    put(node, sample_chunk())
    assert node.lookup(LookupRequest([sample_chunk().chunk_id], EXACT)).lease_id is None


def test_what_is_being_read_is_not_evicted(node: StorageNode) -> None:
    chunks = fill(node)
    oldest = chunks[1]
    with node.open(oldest.chunk_id, oldest.encoding) as reader:
        for number in range(1000, 1000 + 3 * len(chunks)):
            put(node, sample_chunk(content=number, frame_bytes=6000))
        assert b"".join(view for piece in reader.pieces(0, 4, 1 << 20) for view in piece) == oldest.frames(
            0, 4
        )


def test_deleting_waits_for_readers_but_hides_at_once(node: StorageNode) -> None:
    chunk, other = sample_chunk(), sample_chunk(encoding="high-zstd")
    put(node, chunk)
    put(node, other)
    with node.open(chunk.chunk_id, chunk.encoding) as reader:
        assert node.delete([chunk.chunk_id, sample_chunk(content=9).chunk_id]) == 2
        assert not stored(node, chunk)
        node.check_integrity()
        assert node.stats().bytes_used > 0
        # The same chunk may come back while the old bytes are still read.
        assert put(node, chunk)
        assert b"".join(view for piece in reader.pieces(1, 3, 999) for view in piece) == chunk.frames(1, 3)
    assert node.stats().chunks == 1
    assert node.delete([chunk.chunk_id]) == 1
    assert node.stats().bytes_used == 0


def test_views_cannot_be_written_through(node: StorageNode) -> None:
    chunk = sample_chunk()
    put(node, chunk)
    with node.open(chunk.chunk_id, chunk.encoding) as reader:
        views = next(reader.pieces(0, 1, 1 << 20))
        assert all(view.readonly for view in views)


def test_what_is_not_there_cannot_be_read(node: StorageNode) -> None:
    chunk = sample_chunk()
    with (
        pytest.raises(ChunkNotFoundError, match=r"not stored as exact-zstd on node-0"),
        node.open(chunk.chunk_id, chunk.encoding),
    ):
        pass
    put(node, chunk)
    frames = chunk.header.geometry.frame_count
    for first, count in [(-1, 1), (1, 0), (0, frames + 1), (frames, 1), (0, 1 << 40)]:
        with pytest.raises(FrameRangeError, match="which has"):
            read(node, chunk, first, count)
