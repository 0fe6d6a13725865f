"""Encrypted segments: nothing in them is readable or can be changed."""

import itertools
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from kvstore_cluster.disk import RecordMeta
from kvstore_cluster.disk.encrypted_layout import UNIT_BYTES, UNIT_DATA_BYTES, EncryptedLayout
from kvstore_cluster.disk.file import SegmentFile, aligned_buffer
from kvstore_cluster.encryption import EncryptionKey
from kvstore_codec.errors import ChecksumError
from tests.cluster.disk.chunks import append, by_key, meta_of, read, tiny
from tests.cluster.encryption.stores import NEW, encrypted, filled, found_in, large

BLOCK = 4096
SEGMENT, INDEX = "segment-00000001.kvs", "segment-00000001.index"
TENANT = "a-tenant-whose-name-is-secret"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "store"


# ---- what is in the files


def test_nothing_of_a_chunk_or_its_names_is_in_the_folder(folder: Path) -> None:
    store, chunk = encrypted(folder, NEW), large(1)
    store.recover()
    behind = tiny(7).chunk_id
    meta = meta_of(chunk, tenant=TENANT, calibration=b"c" * 32, number=1, behind=behind)
    store.append(meta, [memoryview(chunk.data)], sync=True)
    store.forget(meta_of(tiny(3), tenant=TENANT), 1)
    store.close()
    written = b"".join(path.read_bytes() for path in folder.iterdir())
    assert (folder / INDEX).stat().st_size > 100
    ids = [chunk.chunk_id.content_id, chunk.chunk_id.prefix_id, behind.content_id]
    names = [TENANT.encode(), chunk.encoding.encode(), b"c" * 32, *ids]
    for secret in [
        *names,
        *(chunk.data[at : at + 16] for at in range(0, len(chunk.data), 500)),
    ]:
        assert secret not in written
    assert len(written) > len(chunk.data)


def test_equal_chunks_have_no_equal_blocks(folder: Path) -> None:
    store = encrypted(folder, NEW)
    store.recover()
    for _ in range(3):
        append(store, large(1))
    data = (folder / SEGMENT).read_bytes()
    store.close()
    blocks = [data[at : at + BLOCK] for at in range(0, len(data), BLOCK)]
    assert len(set(blocks)) == len(blocks)


def test_a_store_without_keys_writes_what_it_always_wrote(folder: Path) -> None:
    store, chunk = encrypted(folder), large(1)
    store.recover()
    append(store, chunk)
    data = (folder / SEGMENT).read_bytes()
    assert data[8:12] == (1).to_bytes(4, "little")
    assert data[2 * BLOCK :].startswith(chunk.data)
    assert store.chunks_by_key == {}
    store.close()


# ---- reading


@pytest.mark.parametrize("size_bytes", [1, 4080, 4081, UNIT_DATA_BYTES, UNIT_DATA_BYTES + 1, (1 << 20) + 5])
def test_any_range_of_any_size(folder: Path, size_bytes: int) -> None:
    data = bytes(itertools.islice(itertools.cycle(range(251)), size_bytes))
    store = encrypted(folder, NEW)
    store.recover()
    name = tiny(1)
    views = [memoryview(data)[at : at + 65536] for at in range(0, size_bytes, 65536)]
    location = store.append(RecordMeta(name.chunk_id, name.encoding, size_bytes, 10), views, sync=True)
    assert store.live_bytes == store.record_bytes(size_bytes)
    edges = {0, 1, size_bytes // 2, UNIT_DATA_BYTES - 1, UNIT_DATA_BYTES, 3 * UNIT_DATA_BYTES, size_bytes - 1}
    for begin, end in itertools.product(edges, edges | {size_bytes}):
        if 0 <= begin < end <= size_bytes:
            assert read(store, location, end - begin, begin) == data[begin:end]
            parts = [bytearray((end - begin) // 3), bytearray(end - begin - (end - begin) // 3)]
            store.read(location, begin, [memoryview(part) for part in parts])
            assert b"".join(parts) == data[begin:end]
    store.close()


def test_a_read_of_whole_units_may_end_behind_the_chunk(folder: Path) -> None:
    store, chunk = encrypted(folder, NEW), large(1)
    store.recover()
    location = append(store, chunk)
    unit = store.read_unit_bytes
    assert unit == UNIT_DATA_BYTES
    begin = len(chunk.data) // unit * unit
    view = aligned_buffer(UNIT_BYTES)[:unit]
    store.read(location, begin, [view])
    assert view[: len(chunk.data) - begin] == chunk.data[begin:]
    store.close()


def test_only_units_of_the_range_are_read(folder: Path) -> None:
    """Damage elsewhere in the chunk does not matter."""
    filled(folder, NEW, chunks=1)
    chunk, path = large(0), folder / SEGMENT
    data = bytearray(path.read_bytes())
    data[2 * BLOCK + 5] ^= 1  # in the first unit
    path.write_bytes(data)
    store = encrypted(folder, NEW)
    [(_, location)] = store.recover().records  # by the index
    assert (
        read(store, location, 1000, UNIT_DATA_BYTES) == chunk.data[UNIT_DATA_BYTES : UNIT_DATA_BYTES + 1000]
    )
    with pytest.raises(ChecksumError, match="authentication"):
        read(store, location, 1000, UNIT_DATA_BYTES - 500)
    store.close()


# ---- changed files


def bytes_of_every_block(data: bytes) -> Iterator[int]:
    """A byte of the data and one of the tag of every block."""
    for block in range(0, len(data), BLOCK):
        yield from (block + 100, block + BLOCK - 8)


def test_a_change_of_any_block_is_found_with_and_without_an_index(memory_folder: Path) -> None:
    """The chunk is missing then, and the other is not."""
    folder, changed = memory_folder / "store", memory_folder / "changed"
    expected = by_key(filled(folder, NEW, chunks=2))
    sound = (folder / SEGMENT).read_bytes()
    lost: set[int] = set()
    for at, with_index in itertools.product(bytes_of_every_block(sound), (False, True)):
        shutil.rmtree(changed, ignore_errors=True)
        shutil.copytree(folder, changed)
        if not with_index:
            (changed / INDEX).unlink()
        damaged = bytearray(sound)
        damaged[at] ^= 0x10
        (changed / SEGMENT).write_bytes(damaged)
        store = encrypted(changed, NEW)
        found: dict[tuple[bytes, str], bytes] = {}
        for meta, location in list(store.recover().records):
            with suppress(ChecksumError):
                found[meta.chunk_id.content_id, meta.encoding] = read(store, location, meta.size_bytes)
        store.close()
        assert found.items() <= expected.items(), at
        lost.add(len(expected) - len(found))
    # The first block repeats its sector; the header of a record is not read where there is an index.
    assert lost == {0, 1}


def test_a_changed_index_is_not_used(folder: Path) -> None:
    expected = by_key(filled(folder, NEW))
    sound = (folder / INDEX).read_bytes()
    for at in (0, len(sound) // 2, len(sound) - 1):
        (folder / INDEX).write_bytes(sound[:at] + bytes([sound[at] ^ 1]) + sound[at + 1 :])
        assert found_in(folder, NEW) == expected
    (folder / INDEX).write_bytes(b"short")
    assert found_in(folder, NEW) == expected


def test_a_forged_first_block_sets_the_segment_aside(folder: Path) -> None:
    """Its salt belongs to no key that opens the blocks."""
    filled(folder, NEW)
    data = bytearray((folder / SEGMENT).read_bytes())
    for sector in range(0, BLOCK, 512):
        data[sector + 40] ^= 1
    (folder / SEGMENT).write_bytes(data)
    assert found_in(folder, NEW) == {}
    assert (folder / SEGMENT).with_suffix(".damaged").exists()


@pytest.mark.parametrize("unit", [0, 1])
def test_units_of_two_chunks_that_were_swapped_are_refused(folder: Path, unit: int) -> None:
    filled(folder, NEW, chunks=2)
    data = bytearray((folder / SEGMENT).read_bytes())
    record = len(data) // BLOCK // 2 * BLOCK
    first = BLOCK + BLOCK + unit * UNIT_BYTES
    second = first + record
    data[first : first + UNIT_BYTES], data[second : second + UNIT_BYTES] = (
        data[second : second + UNIT_BYTES],
        data[first : first + UNIT_BYTES],
    )
    (folder / SEGMENT).write_bytes(data)
    store = encrypted(folder, NEW)
    for meta, location in list(store.recover().records):
        with pytest.raises(ChecksumError):
            read(store, location, meta.size_bytes)
    store.close()
    (folder / INDEX).unlink()
    assert found_in(folder, NEW) == {}


def test_segments_that_were_swapped_are_refused(folder: Path, tmp_path: Path) -> None:
    """Also between stores with one key, and with the number in the first block changed."""
    filled(folder, NEW)
    other = tmp_path / "other"
    filled(other, NEW)
    data = (folder / SEGMENT).read_bytes()
    shutil.copy(other / SEGMENT, folder / SEGMENT)
    store = encrypted(folder, NEW)
    assert len(list(store.recover().records)) == 3, "a whole segment of the same key is one of the node's own"
    store.close()
    head = (folder / SEGMENT).read_bytes()[:BLOCK]
    (folder / SEGMENT).write_bytes(head + data[BLOCK:])
    (folder / INDEX).unlink(missing_ok=True)
    assert found_in(folder, NEW) == {}, "the blocks of one segment under the first block of another"


def test_a_truncated_segment_loses_what_is_cut(folder: Path) -> None:
    expected = filled(folder, NEW)
    data = (folder / SEGMENT).read_bytes()
    (folder / SEGMENT).write_bytes(data[: -2 * BLOCK])
    assert found_in(folder, NEW) == by_key(expected[:2])


# ---- what is written once, and where


def test_a_failed_write_uses_no_block_again(folder: Path) -> None:
    """Or two texts would be encrypted with one nonce."""
    offsets: list[range] = []

    class FullDisk(SegmentFile):
        def write(self, offset: int, views: list[memoryview]) -> None:  # type: ignore[override]
            offsets.append(range(offset, offset + sum(view.nbytes for view in views)))
            if len(offsets) == 3:
                raise OSError(28, "No space left on device")
            super().write(offset, views)

    store = encrypted(folder, NEW, open_file=FullDisk)
    store.recover()
    append(store, large(1))
    with pytest.raises(Exception, match="No space left"):
        append(store, large(2))
    store._log.measure()
    append(store, large(3))
    written = [block for part in offsets for block in range(part.start, part.stop, BLOCK)]
    assert len(written) == len(set(written))
    store.check_integrity()
    store.close()
    assert found_in(folder, NEW) == by_key([large(1), large(3)])


def test_a_chunk_that_was_cut_anywhere_is_damaged() -> None:
    layout, written = EncryptedLayout(1, EncryptionKey(NEW), bytes(32)), bytearray()

    class File:
        def write(self, offset: int, views: list[memoryview]) -> None:
            assert offset == BLOCK + len(written)
            written.extend(b"".join(views))

    layout.write(File(), 1, b"header", [memoryview(b"x" * 20_000)])  # type: ignore[arg-type]
    data = memoryview(written)[BLOCK:]
    assert layout.chunk(1, data, 20_000) == b"x" * 20_000
    for left in (0, 5, BLOCK, UNIT_BYTES - 1, UNIT_BYTES, UNIT_BYTES + 5, UNIT_BYTES + 100, len(data) - 1):
        with pytest.raises(ChecksumError):
            layout.chunk(1, data[:left], 20_000)


def test_the_layout_binds_each_unit_to_its_segment(folder: Path) -> None:
    folder.mkdir()
    key, salt = EncryptionKey(NEW), bytes(32)
    file = SegmentFile(folder / "file", create=True, direct=False)
    one, other = EncryptedLayout(1, key, salt), EncryptedLayout(2, key, salt)
    one.write(file, 1, b"header", [memoryview(b"x" * 20_000)])
    found = bytearray(20_000)
    one.read(file, 1, one.data_blocks(20_000), 0, [memoryview(found)])
    assert found == b"x" * 20_000
    with pytest.raises(ChecksumError):
        other.read(file, 1, 5, 0, [memoryview(found)])
    file.close()
