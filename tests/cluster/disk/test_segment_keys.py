"""Segments of several keys: each key can be replaced, and a missing one changes nothing."""

import shutil
from pathlib import Path

import pytest

from kvstore_cluster.disk import RecordMeta, SegmentStore
from kvstore_codec.errors import DiskFailedError, EncryptionKeyError
from tests.cluster.disk.chunks import append, by_key, tiny
from tests.cluster.disk.index import Index, compact
from tests.cluster.encryption.stores import NEW, OLD, encrypted, filled, found_in, keys_of, name_of
from tests.sample_chunk import SampleChunk

BLOCK = 4096
INDEX = "segment-00000001.index"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "store"


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("secrets", [(), (OLD,)])
def test_a_wrong_or_missing_key_is_refused_and_changes_nothing(
    folder: Path, secrets: tuple[bytes, ...]
) -> None:
    expected = by_key(filled(folder, NEW))
    (folder / INDEX).unlink()
    before = snapshot(folder)
    store = encrypted(folder, *secrets)
    with pytest.raises(
        EncryptionKeyError, match=f"key {name_of(NEW)}.*Nothing was changed.*move {folder} away"
    ):
        store.recover()
    with pytest.raises(DiskFailedError):
        append(store, tiny(1))
    store.close()
    assert snapshot(folder) == before
    assert found_in(folder, OLD, NEW) == expected


def test_a_missing_key_of_one_segment_changes_no_other(folder: Path) -> None:
    filled(folder, OLD)
    store = encrypted(folder, NEW, OLD)
    store.recover()
    append(store, tiny(1))
    store.close()
    for index in folder.glob("*.index"):
        index.unlink()
    before = snapshot(folder)
    store = encrypted(folder, OLD)
    with pytest.raises(EncryptionKeyError, match=f"segment-00000002.kvs.*{name_of(NEW)}"):
        store.recover()
    store.close()
    assert snapshot(folder) == before


def test_an_old_key_reads_until_all_is_written_with_the_new_one(folder: Path) -> None:
    stored = filled(folder, OLD)
    store = encrypted(folder, NEW, OLD)
    index = index_of(store, stored)
    index.put(9)
    assert store.chunks_by_key == {name_of(OLD): 3, name_of(NEW): 1}
    rewrite(index, name_of(NEW))
    assert store.chunks_by_key == {name_of(NEW): 4}
    index.check()
    store.close()
    assert found_in(folder, NEW) == by_key([*stored, tiny(9)])


def test_the_segment_in_use_is_left_when_the_key_changes(folder: Path) -> None:
    secrets = [OLD]
    store = SegmentStore(folder, 8 << 20, keys=lambda: keys_of(*secrets))
    store.recover()
    index = Index(store)
    index.put(1)
    secrets.insert(0, NEW)
    index.put(2)
    assert store.chunks_by_key == {name_of(OLD): 1, name_of(NEW): 1}
    rewrite(index, name_of(NEW))
    store.close()
    assert found_in(folder, NEW) == by_key([tiny(1), tiny(2)])


def test_a_plain_folder_is_read_and_then_encrypted(folder: Path) -> None:
    stored = filled(folder)
    store = encrypted(folder, NEW)
    index = index_of(store, stored)
    index.put(9)
    assert store.chunks_by_key == {"": 3, name_of(NEW): 1}
    rewrite(index, name_of(NEW))
    index.check()
    store.close()
    written = b"".join(path.read_bytes() for path in folder.iterdir())
    assert not any(chunk.data[100:120] in written for chunk in stored)
    assert found_in(folder, NEW) == by_key([*stored, tiny(9)])


def test_units_that_end_behind_plain_chunks_are_read(folder: Path) -> None:
    """The last one ends behind the file, too."""
    chunks = [tiny(number) for number in range(3)]
    plain = encrypted(folder)
    plain.recover()
    for chunk in chunks:
        append(plain, chunk)
    plain.close()
    store = encrypted(folder, NEW)
    locations = {meta.chunk_id: location for meta, location in store.recover().records}
    for chunk in chunks:
        view = memoryview(bytearray(b"?" * store.read_unit_bytes))
        store.read(locations[chunk.chunk_id], 0, [view])
        assert view[: len(chunk.data)] == chunk.data
        assert view[BLOCK:] == b"?" * (len(view) - BLOCK), "nothing of the record behind it"
    store.close()


def test_what_was_killed_while_it_was_rewritten_is_there(folder: Path, tmp_path: Path) -> None:
    stored = filled(folder, OLD)
    store = encrypted(folder, NEW, OLD)
    index = index_of(store, stored)
    killed: list[dict[tuple[bytes, str], bytes]] = []

    def relocate(meta: RecordMeta, old: object, new: object) -> bool:
        copy = tmp_path / f"killed-{len(killed)}"
        shutil.copytree(folder, copy)
        killed.append(found_in(copy, NEW, OLD))
        return index.relocate(meta, old, new)  # type: ignore[arg-type]

    while store.chunks_by_key != {name_of(NEW): 3}:
        store.compact(relocate)
    assert killed == [by_key(stored)] * 3
    store.close()


def index_of(store: SegmentStore, stored: list[SampleChunk]) -> Index:
    """An index of a store that was just opened."""
    index = Index(store)
    chunks = {chunk.chunk_id: (number, chunk) for number, chunk in enumerate(stored)}
    for meta, location in list(store.recover().records):
        number, chunk = chunks[meta.chunk_id]
        index.where[number] = (location, chunk)
    return index


def rewrite(index: Index, key_name: str) -> None:
    while set(index.store.chunks_by_key) != {key_name}:
        compact(index)
