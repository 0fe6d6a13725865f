"""Reads of single frames of many chunks from a real disk: asynchronous, each range on its own."""

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from kvstore_cluster.arena import Arena
from kvstore_cluster.disk import SegmentStore
from kvstore_cluster.disk.record import BLOCK_BYTES
from kvstore_cluster.frame_reads import FrameReadOptions, RangeData, RangeDroppedError
from kvstore_cluster.node import StorageNode
from kvstore_cluster.slow_disk import SlowNode, SlowStore
from kvstore_codec.errors import ChunkNotFoundError, FrameRangeError
from tests.cluster.disk_node import put
from tests.sample_chunk import SampleChunk, sample_chunk

CHUNKS = [sample_chunk(content=number, frame_bytes=20_000) for number in range(6)]
PATIENCE_S = 10.0


class Wanted(NamedTuple):
    chunk: int
    first_frame: int
    frame_count: int


EVERY_FRAME = [Wanted(chunk, frame, 1) for chunk in range(len(CHUNKS)) for frame in range(0, 8, 2)]


class Opened:
    """Nodes on one disk, one after the other, each with nothing in memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.nodes: list[StorageNode] = []

    def __call__(
        self,
        options: FrameReadOptions | None = None,
        *,
        direct: bool = True,
    ) -> StorageNode:
        if self.nodes:
            self.nodes[-1].close()
        store = SegmentStore(self.folder, 64 << 20, segment_bytes=8 << 20, direct=direct)
        self.nodes.append(
            StorageNode(
                "node-0", Arena(16 << 20, 4 << 10), store=store, frame_reads=options or FrameReadOptions()
            )
        )
        return self.nodes[-1]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Opened]:
    opened = Opened(tmp_path)
    first = opened()
    for chunk in CHUNKS:
        assert put(first, chunk)
    yield opened
    opened.nodes[-1].check_integrity()
    opened.nodes[-1].close()


def read_all(node: StorageNode, ranges: Sequence[Wanted]) -> dict[int, bytes | Exception]:
    """What comes of each range: its bytes, or the failure."""
    found: dict[int, bytes | Exception] = {}
    with node.read_frames(*named(CHUNKS), ranges) as read:
        for data in read:
            assert data.index not in found
            found[data.index] = data.failure or joined(data)
    assert len(found) == len(ranges)
    return found


def named(chunks: Sequence[SampleChunk]) -> tuple[list, list[str]]:
    return [chunk.chunk_id for chunk in chunks], [chunk.encoding for chunk in chunks]


def joined(data: RangeData) -> bytes:
    return b"".join(view for piece in data.pieces(7000) for view in piece)


def stored_bytes(wanted: Wanted) -> bytes:
    chunk = CHUNKS[wanted.chunk]
    return chunk.frames(wanted.first_frame, wanted.frame_count) if wanted.frame_count else chunk.data


@pytest.mark.parametrize("direct", [True, False], ids=["O_DIRECT", "page cache"])
@pytest.mark.parametrize(
    "options", [FrameReadOptions(), FrameReadOptions(1), FrameReadOptions(4, merge=False)]
)
def test_every_range_of_every_chunk_comes_once_and_whole(
    opened: Opened, options: FrameReadOptions, direct: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.clear()
    node = opened(options, direct=direct)
    assert node.stats().gauges["disk_direct"] == direct
    assert ("through the page cache" in caplog.text) != direct
    ranges = [*EVERY_FRAME, Wanted(2, 0, 0), Wanted(1, 1, 6), Wanted(0, 0, 1)]
    found = read_all(node, ranges)
    assert all(found[index] == stored_bytes(wanted) for index, wanted in enumerate(ranges))


def test_chunks_in_memory_and_on_disk_come_in_one_request(opened: Opened) -> None:
    node = opened()
    with node.open(CHUNKS[3].chunk_id, CHUNKS[3].encoding) as reader:
        assert list(reader.pieces(0, 0, 1 << 20))  # promotes it
    found = read_all(node, EVERY_FRAME)
    assert all(found[index] == stored_bytes(wanted) for index, wanted in enumerate(EVERY_FRAME))
    stats = node.stats()
    assert stats.gauges["memory_chunks"] == 1
    assert stats.counters["frame_disk_reads"] == len(EVERY_FRAME) - 4
    assert stats.counters["frame_disk_bytes"] < 1.3 * sum(map(len, found.values()))  # type: ignore[arg-type]


def test_neighbouring_frames_are_one_read(opened: Opened) -> None:
    node = opened()
    read_all(node, [Wanted(0, frame, 1) for frame in (2, 0, 1, 6)])
    assert node.stats().counters["frame_disk_reads"] == 2
    node = opened(FrameReadOptions(merge=False))
    read_all(node, [Wanted(0, frame, 1) for frame in (2, 0, 1, 6)])
    assert node.stats().counters["frame_disk_reads"] == 4


def test_the_disk_works_on_several_reads_at_once(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    node = opened(FrameReadOptions(depth=4, merge=False))
    read_all(node, [Wanted(chunk, 0, 1) for chunk in range(6)])  # the headers are known now
    together, preadv = threading.Barrier(4), os.preadv

    def wait_for_others(*arguments) -> int:
        together.wait(PATIENCE_S)
        return preadv(*arguments)

    monkeypatch.setattr(os, "preadv", wait_for_others)
    found = read_all(node, EVERY_FRAME)  # 24 reads: six rounds of four
    assert all(found[index] == stored_bytes(wanted) for index, wanted in enumerate(EVERY_FRAME))


def test_a_frame_that_the_chunk_does_not_have_costs_its_own_range(opened: Opened) -> None:
    found = read_all(opened(), [Wanted(0, 0, 1), Wanted(0, 8, 1), Wanted(0, 7, 2), Wanted(1, 7, 1)])
    assert [isinstance(found[index], FrameRangeError) for index in range(4)] == [False, True, True, False]


def test_a_damaged_frame_costs_its_own_range(opened: Opened, tmp_path: Path) -> None:
    """The other ranges of its chunk come, also those that share its blocks; later the chunk is gone."""
    node = opened()
    node.close()
    damage(tmp_path, CHUNKS[1].frames(2, 1)[10_000:10_064])
    node = opened()
    ranges = [Wanted(1, frame, 1) for frame in (0, 1, 2, 3, 7)] + [Wanted(2, 0, 1)]
    found = read_all(node, ranges)
    assert isinstance(found.pop(2), ChunkNotFoundError)
    assert all(found[index] == stored_bytes(ranges[index]) for index in found)
    assert node.stats().counters["damaged"] == 1
    gone = read_all(node, ranges)
    assert [isinstance(gone[index], ChunkNotFoundError) for index in range(6)] == [True] * 5 + [False]


def test_a_block_that_cannot_be_read_costs_the_ranges_that_need_it(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = opened()
    ranges = [Wanted(1, frame, 1) for frame in range(4)]
    read_all(node, ranges)
    begin, length = CHUNKS[1].header.range_bytes(2, 1)
    bad_block = (begin + length // 2) // BLOCK_BYTES * BLOCK_BYTES
    first = position_of(opened.folder, CHUNKS[1].data[:64])
    preadv = os.preadv

    def fail_there(fd: int, views: Sequence[memoryview], offset: int) -> int:
        if offset <= first + bad_block < offset + sum(len(view) for view in views):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(fd, views, offset)

    monkeypatch.setattr(os, "preadv", fail_there)
    found = read_all(node, ranges)
    assert isinstance(found.pop(2), ChunkNotFoundError)
    assert all(found[index] == stored_bytes(ranges[index]) for index in found)
    assert node.stats().counters["damaged"] == 0
    monkeypatch.undo()
    assert read_all(node, ranges)[2] == stored_bytes(ranges[2])


@pytest.mark.parametrize("unit_bytes", [512, BLOCK_BYTES])
def test_frames_are_read_in_the_smallest_units_of_the_disk(
    opened: Opened, monkeypatch: pytest.MonkeyPatch, unit_bytes: int
) -> None:
    """A disk that refuses sectors of 512 bytes reads whole blocks, with the same result."""
    preadv = os.preadv

    def of_units(fd: int, views: Sequence[memoryview], offset: int) -> int:
        if offset % unit_bytes or any(len(view) % unit_bytes for view in views):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return preadv(fd, views, offset)

    monkeypatch.setattr(os, "preadv", of_units)
    node = opened()
    ranges = [Wanted(chunk, frame, 1) for chunk in (0, 2) for frame in (1, 5)]
    found = read_all(node, ranges)
    assert all(found[index] == stored_bytes(ranges[index]) for index in found)
    counters, wanted_bytes = node.stats().counters, sum(len(stored_bytes(one)) for one in ranges)
    assert counters["frame_disk_bytes"] % unit_bytes == 0
    if node.stats().gauges["disk_direct"]:
        assert 0 <= counters["frame_disk_bytes"] - wanted_bytes < 2 * unit_bytes * len(ranges)


def test_what_is_dropped_is_not_read(opened: Opened) -> None:
    node = opened(FrameReadOptions(depth=2, merge=False))
    found: dict[int, Exception | None] = {}
    with node.read_frames(*named(CHUNKS), EVERY_FRAME) as read:
        for data in read:
            found[data.index] = data.failure
            if len(found) == 1:
                read.drop(range(4, len(EVERY_FRAME)))
    assert len(found) == len(EVERY_FRAME)
    dropped = {index for index, failure in found.items() if isinstance(failure, RangeDroppedError)}
    assert dropped == set(range(4, len(EVERY_FRAME)))
    stats = node.stats()
    assert stats.counters["ranges_dropped"] == len(EVERY_FRAME) - 4
    assert stats.counters["frame_disk_reads"] <= 6  # those that the disk had begun


def test_a_request_that_ends_early_leaves_nothing_behind(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reads that the disk is still working on keep their chunks and buffers until they end."""
    node = opened(FrameReadOptions(depth=4, merge=False))
    read_all(node, EVERY_FRAME)
    gate, preadv, begun = threading.Event(), os.preadv, threading.Semaphore(0)

    def wait_for_gate(*arguments) -> int:
        begun.release()
        assert gate.wait(PATIENCE_S)
        return preadv(*arguments)

    with node.read_frames(*named(CHUNKS), EVERY_FRAME) as read:
        results = iter(read)
        assert next(results).failure is None
        monkeypatch.setattr(os, "preadv", wait_for_gate)
        next(results)
        begun.acquire()
    assert node._frames.buffers.lent_bytes > 0
    node.delete([chunk.chunk_id for chunk in CHUNKS])
    gate.set()
    wait_until(lambda: node._frames.buffers.lent_bytes == 0)
    wait_until(lambda: not node._catalog._readers)
    assert node.stats().chunks == 0


def test_a_chunk_that_is_deleted_meanwhile_costs_its_own_ranges(opened: Opened) -> None:
    node = opened(FrameReadOptions(depth=1, merge=False))
    ranges = [*EVERY_FRAME[:4], *EVERY_FRAME[8:12]]
    found: dict[int, Exception | None] = {}
    with node.read_frames(*named(CHUNKS), ranges) as read:
        for data in read:
            found[data.index] = data.failure
            if len(found) == 2:
                node.delete([CHUNKS[0].chunk_id])
    failed = [isinstance(found[index], ChunkNotFoundError) for index in range(8)]
    assert failed[:2] == [False, False]
    assert failed[3]
    assert failed[4:] == [False] * 4


def test_a_limited_disk_limits_these_reads_too(tmp_path: Path) -> None:
    store = SlowStore(tmp_path, 64 << 20, segment_bytes=8 << 20)
    node = SlowNode("node-0", Arena(16 << 20, 4 << 10), store=store)
    for chunk in CHUNKS:
        assert put(node, chunk)
    while node.maintain():
        pass
    node.limit_disk(4e6)
    assert node.stats().gauges["memory_chunks"] == 0
    began_s = time.monotonic()
    found = read_all(node, EVERY_FRAME)
    took_s = time.monotonic() - began_s
    assert all(found[index] == stored_bytes(wanted) for index, wanted in enumerate(EVERY_FRAME))
    assert took_s >= node.stats().counters["frame_disk_bytes"] / 4e6
    node.close()


def damage(folder: Path, piece: bytes) -> None:
    """Turns over a bit of these bytes on disk."""
    for path in folder.glob("*.kvs"):
        data = bytearray(path.read_bytes())
        position = data.find(piece)
        if position >= 0:
            data[position] ^= 1
            path.write_bytes(data)
            return
    raise AssertionError("these bytes are not on disk")


def position_of(folder: Path, piece: bytes) -> int:
    return max(path.read_bytes().find(piece) for path in folder.glob("*.kvs"))


def wait_until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
