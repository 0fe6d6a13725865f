"""A storage node whose disk is encrypted: what it serves, what it drops, and what it says."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

import pytest

from kvstore_cluster.arena import Arena
from kvstore_cluster.forgotten import Forgotten
from kvstore_cluster.node import StorageNode
from kvstore_cluster.tallies import Sample
from kvstore_codec.errors import ChunkNotFoundError
from tests.cluster.disk_node import put, read, stored
from tests.cluster.encryption.stores import NEW, OLD, encrypted, name_of
from tests.sample_chunk import SampleChunk, sample_chunk

CHUNKS = [sample_chunk(content=number, frame_bytes=5000) for number in range(4)]
TENANT = "a-tenant-whose-name-is-secret"


class Open(Protocol):
    def __call__(self, *secrets: bytes, isolated: bool = False) -> StorageNode: ...


class Wanted(NamedTuple):
    chunk: int
    first_frame: int
    frame_count: int


@pytest.fixture
def open_node(tmp_path: Path) -> Iterator[Open]:
    """Opens the node again with these keys, and nothing in memory."""
    opened: list[StorageNode] = []

    def start(*secrets: bytes, isolated: bool = False) -> StorageNode:
        if opened:
            opened.pop().close()
        store = encrypted(tmp_path / "disk", *secrets, segment_bytes=1 << 20)
        opened.append(StorageNode("node-0", Arena(4 << 20, 4 << 10), store=store, isolated=isolated))
        return opened[-1]

    yield start
    opened[-1].check_integrity()
    opened[-1].close()


def damage(tmp_path: Path, offset: int) -> None:
    [path] = (tmp_path / "disk").glob("*.kvs")
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def frames(node: StorageNode, wanted: list[Wanted]) -> dict[int, bytes | None]:
    """The bytes of each range, None for those that failed."""
    names = [chunk.chunk_id for chunk in CHUNKS]
    with node.read_frames(names, [chunk.encoding for chunk in CHUNKS], wanted) as ranges:
        return {
            found.index: None if found.failure else b"".join(bytes(view) for view in found.views)
            for found in ranges
        }


def test_chunks_survive_a_restart_and_are_served(open_node: Open) -> None:
    node = open_node(NEW)
    for chunk in CHUNKS:
        assert put(node, chunk)
    node = open_node(NEW)
    for chunk in CHUNKS:
        assert read(node, chunk, 1, 1) == chunk.data[slice(*_range(chunk, 1, 1))]
        assert read(node, chunk) == chunk.data


def test_single_frames_are_read_in_any_order(open_node: Open) -> None:
    node = open_node(NEW)
    for chunk in CHUNKS:
        put(node, chunk)
    node = open_node(NEW)
    count = len(CHUNKS[0].header.frame_lengths)
    wanted = [Wanted(chunk, frame, 1) for chunk in range(len(CHUNKS)) for frame in range(count)]
    wanted += [Wanted(0, 0, 0), Wanted(1, 1, count - 1)]
    found = frames(node, wanted)
    for index, one in enumerate(wanted):
        chunk = CHUNKS[one.chunk]
        whole = not one.frame_count
        begin, end = (0, len(chunk.data)) if whole else _range(chunk, one.first_frame, one.frame_count)
        assert found[index] == chunk.data[begin:end]


def test_a_changed_chunk_is_dropped_and_missing(open_node: Open, tmp_path: Path) -> None:
    node = open_node(NEW)
    for chunk in CHUNKS:
        put(node, chunk)
    open_node(NEW)
    damage(tmp_path, 2 * 4096 + 17 + (16 << 10))
    node = open_node(NEW)
    assert all(stored(node, chunk) for chunk in CHUNKS)
    with pytest.raises(ChunkNotFoundError):
        read(node, CHUNKS[0])
    assert not stored(node, CHUNKS[0])
    assert node.stats().counters["damaged"] == 1
    for chunk in CHUNKS[1:]:
        assert read(node, chunk) == chunk.data


def test_changed_frames_fail_and_the_chunk_is_dropped(open_node: Open, tmp_path: Path) -> None:
    node = open_node(NEW)
    for chunk in CHUNKS:
        put(node, chunk)
    open_node(NEW)
    damage(tmp_path, 2 * 4096 + 17 + (16 << 10))
    node = open_node(NEW)
    last = len(CHUNKS[0].header.frame_lengths) - 1
    found = frames(node, [Wanted(0, 3, 1), Wanted(1, last, 1)])
    begin, end = _range(CHUNKS[1], last, 1)
    assert found == {0: None, 1: CHUNKS[1].data[begin:end]}
    assert not stored(node, CHUNKS[0])


def test_verify_finds_a_changed_chunk(open_node: Open, tmp_path: Path) -> None:
    put(open_node(NEW), CHUNKS[0])
    open_node(NEW)
    damage(tmp_path, 2 * 4096 + 17)
    node = open_node(NEW)
    assert "authentication" in str(node.verify(CHUNKS[0].chunk_id, CHUNKS[0].encoding))
    assert not stored(node, CHUNKS[0])


def test_a_forgotten_tenant_stays_forgotten(open_node: Open, tmp_path: Path) -> None:
    node = open_node(NEW, isolated=True)
    put(node, CHUNKS[0], tenant=TENANT)
    put(node, CHUNKS[1], tenant="other")
    node.forget(Forgotten({TENANT: 5}))
    node = open_node(NEW, isolated=True)
    assert set(node.usage()) == {"other"}
    assert node.forgotten_generation == 5
    for path in (tmp_path / "disk").iterdir():
        assert TENANT.encode() not in path.read_bytes()


def test_statistics_count_chunks_by_key(open_node: Open) -> None:
    """So an operator knows when an old key can go: also the list of forgotten tenants needs it."""
    put(open_node(), CHUNKS[0])
    assert not [one for one in open_node().stats().samples if one.name == "disk_chunks_by_key"]
    node = open_node(OLD)
    put(node, CHUNKS[1])
    node.forget(Forgotten({TENANT: 5}))
    node = open_node(NEW, OLD)
    put(node, CHUNKS[2])
    counted = {one.labels: one.value for one in node.stats().samples if one.name == "disk_chunks_by_key"}
    assert counted == {("plain",): 1, (name_of(OLD),): 1, (name_of(NEW),): 1}
    only_new = Sample("disk_chunks_by_key", (name_of(NEW),), 3)
    while [one for one in node.stats().samples if one.name == only_new.name] != [only_new]:
        node.maintain()
    node = open_node(NEW)
    assert node.forgotten_generation == 5
    for chunk in CHUNKS[:3]:
        assert read(node, chunk) == chunk.data


def _range(chunk: SampleChunk, first: int, count: int) -> tuple[int, int]:
    offset, length = chunk.header.range_bytes(first, count)
    return offset, offset + length
