"""A disk that fails to read for a moment costs a miss at most; only what is damaged is dropped."""

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvstore_cluster.arena import Arena
from kvstore_cluster.disk import SegmentStore
from kvstore_cluster.lookup import LookupRequest
from kvstore_cluster.node import StorageNode
from kvstore_codec.errors import ChunkNotFoundError
from tests.sample_chunk import SampleChunk, sample_chunk

CHUNK = sample_chunk(content=0, frame_bytes=6000)
ERRORS = pytest.mark.parametrize("error", [errno.ENOMEM, errno.EINTR, errno.EIO], ids=errno.errorcode.get)


class FlakyDisk:
    """Of this process: the next `failures` reads fail with `error`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.failures = 0
        self.error = errno.EIO
        self._preadv = os.preadv
        monkeypatch.setattr(os, "preadv", self.preadv)

    def preadv(self, *arguments) -> int:
        if self.failures:
            self.failures -= 1
            raise OSError(self.error, os.strerror(self.error))
        return self._preadv(*arguments)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> FlakyDisk:
    return FlakyDisk(monkeypatch)


@pytest.fixture
def opened(tmp_path: Path, disk: FlakyDisk) -> Iterator[Callable[[], StorageNode]]:
    """A node on the same disk, with nothing in memory."""
    nodes: list[StorageNode] = []

    def start() -> StorageNode:
        if nodes:
            nodes[-1].close()
        store = SegmentStore(tmp_path, 16 << 20, segment_bytes=1 << 20)
        nodes.append(StorageNode("node-0", Arena(1 << 20, 4 << 10), store=store))
        return nodes[-1]

    yield start
    disk.failures = 0
    nodes[-1].check_integrity()
    nodes[-1].close()


@pytest.fixture
def node(opened: Callable[[], StorageNode]) -> StorageNode:
    assert put(opened(), CHUNK)
    return opened()


def put(node: StorageNode, chunk: SampleChunk) -> bool:
    pending = node.begin_put(chunk.chunk_id, chunk.encoding, len(chunk.data))
    if pending is None:
        return False
    pending.write(memoryview(chunk.data))
    return pending.commit()


def read(node: StorageNode, chunk: SampleChunk, first: int = 0, count: int = 0) -> bytes:
    with node.open(chunk.chunk_id, chunk.encoding) as reader:
        return b"".join(view for piece in reader.pieces(first, count, 10_000) for view in piece)


def found(node: StorageNode, *, with_headers: bool = True) -> bool:
    answers = node.lookup(
        LookupRequest([CHUNK.chunk_id], [CHUNK.encoding], with_headers=with_headers, peek=True)
    ).answers
    return answers[0].encoding is not None


@ERRORS
@pytest.mark.parametrize("failures", [1, 2])
def test_a_read_that_fails_is_tried_again(
    node: StorageNode, disk: FlakyDisk, error: int, failures: int
) -> None:
    disk.error, disk.failures = error, failures
    assert found(node)
    disk.failures = failures
    assert read(node, CHUNK, 3, 1) == CHUNK.frames(3, 1)
    disk.failures = failures
    assert read(node, CHUNK) == CHUNK.data
    assert node.stats().counters["disk_read_errors"] == node.stats().counters["damaged"] == 0


@ERRORS
@pytest.mark.parametrize("frames", [(0, 0), (3, 1)], ids=["all of it", "a frame"])
def test_what_cannot_be_read_is_a_miss_and_stays(
    node: StorageNode, disk: FlakyDisk, error: int, frames: tuple[int, int]
) -> None:
    disk.error, disk.failures = error, 1000
    with pytest.raises(ChunkNotFoundError, match="cannot read"):
        read(node, CHUNK, *frames)
    assert not found(node)
    stats = node.stats()
    assert (stats.counters["disk_read_errors"], stats.counters["damaged"]) == (2, 0)
    assert (stats.gauges["disk_unreadable"], stats.gauges["disk_chunks"]) == (1, 1)
    node.check_integrity()
    disk.failures = 0
    assert found(node)
    assert read(node, CHUNK, *frames) == (CHUNK.frames(*frames) if any(frames) else CHUNK.data)
    assert node.stats().gauges["disk_unreadable"] == 0


def test_verification_names_what_cannot_be_read_and_leaves_it(node: StorageNode, disk: FlakyDisk) -> None:
    disk.failures = 1000
    assert "cannot read" in (node.verify(CHUNK.chunk_id, CHUNK.encoding) or "")
    disk.failures = 0
    assert node.verify(CHUNK.chunk_id, CHUNK.encoding) is None
    assert read(node, CHUNK) == CHUNK.data


def test_what_cannot_be_read_is_stored_again_when_it_comes(node: StorageNode, disk: FlakyDisk) -> None:
    assert not put(node, CHUNK)
    disk.failures = 1000
    assert not found(node)
    assert put(node, CHUNK)
    assert node.stats().gauges["disk_unreadable"] == 0
    assert read(node, CHUNK) == CHUNK.data
    assert node.stats().gauges["disk_chunks"] == node.stats().chunks == 1


def test_a_file_that_was_cut_is_damage(node: StorageNode, tmp_path: Path) -> None:
    for segment in tmp_path.glob("*.kvs"):
        os.truncate(segment, 8192)
    with pytest.raises(ChunkNotFoundError, match="any more"):
        read(node, CHUNK)
    assert node.stats().counters["damaged"] == 1
    assert not found(node, with_headers=False)


def test_compaction_leaves_what_cannot_be_read_and_moves_the_rest(
    opened: Callable[[], StorageNode], disk: FlakyDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvstore_cluster.disk.compaction._UNREADABLE_S", 0.0)
    node = opened()
    chunks = [sample_chunk(content=number, frame_bytes=6000) for number in range(60)]
    for chunk in chunks:
        put(node, chunk)
    node = opened()
    node.delete([chunk.chunk_id for chunk in chunks[1:50]])
    disk.failures = 1000
    while node.maintain():
        pass
    disk.failures = 0
    assert node.stats().counters["damaged"] == 0
    assert all(read(node, chunk) == chunk.data for chunk in (chunks[0], *chunks[50:]))
    while node.maintain():
        pass
    assert all(read(node, chunk) == chunk.data for chunk in (chunks[0], *chunks[50:]))
