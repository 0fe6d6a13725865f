"""Opening a store whose files were damaged anywhere, and what indexes are for."""

import random
import shutil
import struct
from pathlib import Path

import pytest
import xxhash

from kvstore_cluster.disk import Location, RecordMeta, SegmentStore
from kvstore_codec.errors import DiskFailedError
from tests.cluster.disk.chunks import append, by_key, contents, meta_of, tiny
from tests.cluster.disk.image import BLOCK, INDEX, LIMIT, SEGMENT, Image, check, goes_on, with_segment
from tests.sample_chunk import sample_chunk


@pytest.mark.parametrize("record", range(4))
@pytest.mark.parametrize("part", [0, 1], ids=["header", "chunk"])
def test_a_damaged_record_costs_only_itself(image: Image, tmp_path: Path, record: int, part: int) -> None:
    data = bytearray(image.data)
    start = image.starts[record] + part * BLOCK
    data[start : start + BLOCK] = random.Random(record).randbytes(BLOCK)
    store = with_segment(tmp_path / "store", bytes(data))
    whole = [chunk for number, chunk in enumerate(image.chunks) if number != record]
    check(store, whole, lost=True)
    goes_on(store, tmp_path / "store", whole)


@pytest.mark.parametrize("sound_sector", [0, 3, 7])
def test_one_sound_sector_of_the_first_block_is_enough(
    image: Image, tmp_path: Path, sound_sector: int
) -> None:
    data = bytearray(image.data)
    kept = data[sound_sector * 512 : (sound_sector + 1) * 512]
    data[:BLOCK] = bytes(BLOCK)
    data[sound_sector * 512 : (sound_sector + 1) * 512] = kept
    store = with_segment(tmp_path / "store", bytes(data))
    check(store, image.chunks, lost=False)
    store.close()


def test_a_segment_without_a_first_block_is_set_aside(image: Image, tmp_path: Path) -> None:
    folder = tmp_path / "store"
    store = with_segment(folder, bytes(BLOCK) + image.data[BLOCK:])
    check(store, [], lost=True)
    goes_on(store, folder, [])
    assert (folder / "segment-00000001.damaged").read_bytes()[BLOCK:] == image.data[BLOCK:]


def test_a_segment_that_was_only_begun_is_removed(image: Image, tmp_path: Path) -> None:
    for cut in (0, 1, 511, 4095):
        store = with_segment(tmp_path / "store", image.data[:cut])
        check(store, [], lost=True)
        goes_on(store, tmp_path / "store", [])


def test_a_newer_format_is_refused(image: Image, tmp_path: Path) -> None:
    signed = struct.pack("<8sIIQ", b"KVSEGMNT", 3, 1, 12345)
    newer = signed + xxhash.xxh3_64_intdigest(signed).to_bytes(8, "little")
    store = with_segment(tmp_path / "store", newer.ljust(BLOCK, b"\0") + image.data[BLOCK:])
    with pytest.raises(DiskFailedError, match="format version 3"):
        store.recover()
    store.close()


def test_a_chunk_that_looks_like_a_record_is_none(image: Image, tmp_path: Path) -> None:
    """Whoever puts chunks can write anything into them, a copy of a segment as well."""
    chunk = tiny(7)
    store = SegmentStore(tmp_path / "store", LIMIT)
    store.recover()
    meta = RecordMeta(chunk.chunk_id, chunk.encoding, len(image.data), chunk.header.header_bytes)
    store.append(meta, [memoryview(image.data)], sync=True)
    data = bytearray((tmp_path / "store" / SEGMENT).read_bytes())
    store.close()
    data[BLOCK] ^= 255
    store = with_segment(tmp_path / "store", bytes(data))
    check(store, [], lost=True)
    store.close()


def test_an_index_is_only_an_aid(tmp_path: Path, memory_folder: Path) -> None:
    folder = memory_folder / "store"
    store = SegmentStore(folder, LIMIT)
    store.recover()
    chunks = [tiny(content) for content in range(3)]
    for chunk in chunks:
        append(store, chunk)
    store.close()
    index = (folder / INDEX).read_bytes()
    for at in range(len(index)):
        damaged = index[:at] + bytes([index[at] ^ 1]) + index[at + 1 :]
        for data in (damaged, index[:at]):
            (folder / INDEX).write_bytes(data)
            again = SegmentStore(folder, LIMIT)
            check(again, chunks, lost=False)
            again.close()


def test_an_index_of_another_segment_is_not_believed(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    stores = [SegmentStore(tmp_path / name, LIMIT) for name in ("store", "other")]
    for number, store in enumerate(stores):
        store.recover()
        append(store, tiny(number))
        store.close()
    shutil.copy(tmp_path / "other" / INDEX, folder / INDEX)
    again = SegmentStore(folder, LIMIT)
    check(again, [tiny(0)], lost=False)
    again.close()


def test_an_index_without_its_segment_is_removed(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    store = SegmentStore(folder, LIMIT)
    store.recover()
    append(store, tiny(0))
    store.close()
    (folder / SEGMENT).unlink()
    again = SegmentStore(folder, LIMIT)
    check(again, [], lost=False)
    assert not (folder / INDEX).exists()
    again.close()


def test_a_sealed_segment_that_was_cut_is_read(image: Image, tmp_path: Path) -> None:
    folder = tmp_path / "store"
    with_segment(folder, image.data).close()
    store = SegmentStore(folder, LIMIT)
    check(store, image.chunks, lost=False)
    store.close()
    assert (folder / INDEX).exists()
    (folder / SEGMENT).write_bytes(image.data[: image.end(3) - 1])
    again = SegmentStore(folder, LIMIT)
    check(again, image.chunks[:3], lost=True)
    again.close()


def test_numbers_go_on_after_a_restart(tmp_path: Path) -> None:
    """What is put after a restart is newer than what was put before."""
    for version in range(5):
        store = SegmentStore(tmp_path, LIMIT)
        store.recover()
        append(store, tiny(0, version))
        store.close()
    store = SegmentStore(tmp_path, LIMIT)
    assert contents(store) == by_key([tiny(0, version=4)])
    store.close()


def test_what_was_read_once_is_not_read_again(image: Image, tmp_path: Path) -> None:
    """Opening seals what it finds: damage that comes later is found by who reads the chunk."""
    folder = tmp_path / "store"
    store = with_segment(folder, image.data)
    store.recover()
    store.close()
    data = bytearray(image.data)
    data[image.end(0) - 1] ^= 1
    (folder / SEGMENT).write_bytes(data)
    again = SegmentStore(folder, LIMIT)
    assert len(list(again.recover().records)) == 4
    again.close()


def test_large_chunks_are_verified_and_found(tmp_path: Path) -> None:
    """Chunks larger than the window that a segment is read through."""
    store = SegmentStore(tmp_path / "store", 256 << 20)
    store.recover()
    chunks = [sample_chunk(content, frame_bytes=1 << 19) for content in range(3)]
    assert min(len(chunk.data) for chunk in chunks) > 4 << 20
    locations: list[Location] = [append(store, chunk) for chunk in chunks]
    data = (tmp_path / "store" / SEGMENT).read_bytes()
    store.close()
    damaged = bytearray(data)
    damaged[locations[1] % (1 << 24) * BLOCK + (3 << 20)] ^= 1
    again = SegmentStore(tmp_path / "again", 256 << 20)
    (tmp_path / "again" / SEGMENT).write_bytes(damaged)
    check(again, [chunks[0], chunks[2]], lost=True)
    again.close()


def test_meta_of_is_what_was_put(tmp_path: Path) -> None:
    store = SegmentStore(tmp_path, LIMIT)
    store.recover()
    append(store, tiny(3), sync=False)
    shutil.copytree(tmp_path, tmp_path.with_name("copy"))
    store.close()
    again = SegmentStore(tmp_path.with_name("copy"), LIMIT)
    assert [meta for meta, _ in again.recover().records] == [meta_of(tiny(3))]
    again.close()
