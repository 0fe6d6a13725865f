"""Damaged chunks on a storage node: they are found, dropped, and never given out."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from kvstore_cluster import memory_tier
from kvstore_cluster.disk_reads import require_sound
from kvstore_cluster.lookup import LookupRequest
from kvstore_cluster.node import StorageNode
from kvstore_cluster.scrub import scrub
from kvstore_codec.errors import ChunkNotFoundError
from tests.cluster.disk_node import Opener, chunk_of, put, read, stored
from tests.sample_chunk import SampleChunk


def test_damage_on_disk_is_found_and_dropped(opened: Opener, tmp_path: Path) -> None:
    node = opened()
    chunks = [chunk_of(number) for number in range(30)]
    for chunk in chunks:
        put(node, chunk)
    for segment in (tmp_path / "disk").glob("*.kvs"):
        data = bytearray(segment.read_bytes())
        position = data.find(chunks[0].data[5000:5100])
        if position >= 0:
            data[position] ^= 1
            segment.write_bytes(data)
    progress = list(scrub(node))
    (damage,) = [damage for step in progress for damage in step.damaged]
    assert damage.variant.chunk_id == chunks[0].chunk_id
    assert progress[-1].checked == 30
    assert not stored(node, chunks[0])
    assert not [damage for step in scrub(node) for damage in step.damaged]


def test_a_damaged_chunk_is_never_given_out(opened: Opener, tmp_path: Path) -> None:
    node = opened()
    chunk = chunk_of(0)
    put(node, chunk)
    node = opened()
    (segment,) = (
        path for path in (tmp_path / "disk").glob("*.kvs") if chunk.data[5000:5100] in path.read_bytes()
    )
    data = bytearray(segment.read_bytes())
    data[data.find(chunk.data[5000:5100])] ^= 1
    segment.write_bytes(data)
    with pytest.raises(ChunkNotFoundError, match="damaged"):
        read(node, chunk)
    assert node.stats().counters["damaged"] == 1
    assert put(node, chunk)
    assert read(node, chunk) == chunk.data


@pytest.mark.parametrize("damaged", [(), (0,), (1,), (0, 2), (1, 2), (0, 1, 2)])
def test_encodings_that_the_disk_has_lost_are_left_out_of_an_answer(
    opened: Opener, tmp_path: Path, damaged: tuple[int, ...]
) -> None:
    node = opened()
    variants = [chunk_of(0, name) for name in ("exact-zstd", "medium-raw", "low-zstd")]
    for variant in variants:
        put(node, variant)
    node = opened()
    for segment in (tmp_path / "disk").glob("*.kvs"):
        data = bytearray(segment.read_bytes())
        for number in damaged:
            header = variants[number].data[: variants[number].header.header_bytes]
            position = data.find(header)
            if position >= 0:
                data[position + len(header) - 1] ^= 1
        segment.write_bytes(data)
    names = [variant.encoding for variant in variants]
    (answer,) = node.lookup(LookupRequest([variants[0].chunk_id], names, all_encodings=True)).answers
    found = [(answer.encoding, answer.header, answer.size_bytes)] if answer.encoding else []
    found += [(other.encoding, other.header, other.size_bytes) for other in answer.others]
    assert found == [
        (variant.encoding, variant.data[: variant.header.header_bytes], len(variant.data))
        for number, variant in enumerate(variants)
        if number not in damaged
    ]
    assert node.stats().counters["damaged"] == len(damaged)


def put_and_damage_in_memory(node: StorageNode, chunk: SampleChunk) -> None:
    pending = node.begin_put(chunk.chunk_id, chunk.encoding, len(chunk.data))
    assert pending is not None
    views = list(pending.views())
    pending.write(chunk.data)
    pending.commit()
    views[-1][len(views[-1]) - 1] ^= 1


def test_damage_in_memory_leaves_the_copy_on_disk(opened: Opener) -> None:
    node = opened()
    chunk = chunk_of(0)
    put_and_damage_in_memory(node, chunk)
    assert "in memory" in (node.verify(chunk.chunk_id, chunk.encoding) or "")
    assert read(node, chunk) == chunk.data
    assert node.verify(chunk.chunk_id, chunk.encoding) is None
    node.check_integrity()


def test_two_that_find_the_same_damage_in_memory_drop_one_copy(
    opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = opened()
    chunk = chunk_of(0)
    put_and_damage_in_memory(node, chunk)
    both_found_it = threading.Barrier(2)

    def find(*arguments: Any) -> None:
        try:
            require_sound(*arguments)
        finally:
            both_found_it.wait(60)

    monkeypatch.setattr(memory_tier, "require_sound", find)
    with ThreadPoolExecutor(2) as threads:
        found = [threads.submit(node.verify, chunk.chunk_id, chunk.encoding) for _ in range(2)]
    assert all("in memory" in (reason.result() or "") for reason in found)
    node.check_integrity()
    assert node.stats().counters["damaged"] == 1
    assert read(node, chunk) == chunk.data


def damage(folder: Path, data: bytes) -> None:
    for segment in folder.glob("*.kvs"):
        content = bytearray(segment.read_bytes())
        if (position := content.find(data)) >= 0:
            content[position + len(data) // 2] ^= 1
            segment.write_bytes(content)
            return
    raise AssertionError("it is on no disk")


def test_damage_on_disk_is_written_anew_from_memory(opened: Opener, tmp_path: Path) -> None:
    node = opened()
    chunk = chunk_of(0)
    put(node, chunk)
    damage(tmp_path / "disk", chunk.data[5000:5100])
    assert "damaged" in (node.verify(chunk.chunk_id, chunk.encoding) or "")
    while node.maintain():
        pass
    assert read(opened(), chunk) == chunk.data


def test_damage_on_disk_wakes_the_maintenance_thread(opened: Opener, tmp_path: Path) -> None:
    node = opened()
    chunk = chunk_of(0)
    put(node, chunk)
    damage(tmp_path / "disk", chunk.data[5000:5100])
    waiting = threading.Event()
    lock = node._catalog.lock

    def wait() -> bool:
        with lock:
            waiting.set()
            return bool(lock.wait(60))

    with ThreadPoolExecutor(1) as threads:
        notified = threads.submit(wait)
        waiting.wait(60)
        assert "damaged" in (node.verify(chunk.chunk_id, chunk.encoding) or "")
        assert notified.result()


@pytest.mark.parametrize("where", [slice(40, 60), slice(20_000, 20_100)], ids=["header", "frame"])
def test_damage_is_noticed_by_small_reads_and_can_be_put_right(
    opened: Opener, tmp_path: Path, where: slice
) -> None:
    node = opened()
    chunk = chunk_of(0)
    put(node, chunk)
    node = opened()
    damage(tmp_path / "disk", chunk.data[where])
    frames = range(chunk.header.geometry.frame_count)
    with pytest.raises(ChunkNotFoundError, match="damaged"):
        b"".join(read(node, chunk, frame, 1) for frame in frames)
    assert not stored(node, chunk)
    assert put(node, chunk)
    assert read(node, chunk) == chunk.data


def test_damage_that_compaction_finds_is_dropped(opened: Opener, tmp_path: Path) -> None:
    node = opened()
    chunks = [chunk_of(number) for number in range(60)]
    for chunk in chunks:
        put(node, chunk)
    node = opened()
    damage(tmp_path / "disk", chunks[0].data[5000:5100])
    for chunk in chunks[1:50]:
        node.delete([chunk.chunk_id])
    while node.maintain():
        pass
    assert not stored(node, chunks[0])
    assert node.stats().counters["damaged"] == 1
    assert all(read(node, chunk) == chunk.data for chunk in chunks[50:])
