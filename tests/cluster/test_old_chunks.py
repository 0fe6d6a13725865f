"""Chunks of format version 1, which say nothing of their decoded samples, on the disk of a node that has been updated.

The files were written by the last release that made them."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvstore_cluster.arena import Arena
from kvstore_cluster.disk import RecordMeta, SegmentStore
from kvstore_cluster.lookup import LookupRequest
from kvstore_cluster.node import StorageNode
from kvstore_cluster.put import PutOptions
from kvstore_cluster.scrub import scrub
from kvstore_codec.encoding import Encoding
from kvstore_codec.errors import ChunkNotFoundError, UnsupportedVersionError
from kvstore_codec.whole_chunk import verify_chunk
from tests.codec.chunks import CHUNK_ID, encode, make_kv, make_spec

ENCODINGS = ("exact-zstd", "high-hevc-cpu")
DATA = Path(__file__).parents[1] / "data"
OLD = {name: (DATA / f"chunk-version-1-{name}.kvc").read_bytes() for name in ENCODINGS}
SPEC = make_spec(layers=1, kv_heads=1, head_dim=16)

Opener = Callable[[], StorageNode]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Opener]:
    """Opens a node on one and the same disk, again and again."""
    stores: list[SegmentStore] = []

    def start() -> StorageNode:
        if stores:
            stores[-1].close()
        stores.append(SegmentStore(tmp_path / "disk", 16 << 20, segment_bytes=1 << 20))
        return StorageNode("node-0", Arena(1 << 20, 4096), store=stores[-1])

    yield start
    stores[-1].close()


@pytest.fixture
def old_disk(tmp_path: Path) -> None:
    store = SegmentStore(tmp_path / "disk", 16 << 20, segment_bytes=1 << 20)
    store.recover()
    for name, data in OLD.items():
        meta = RecordMeta(CHUNK_ID, name, len(data), len(data) // 2, cost=16.0)
        store.append(meta, [memoryview(data)], sync=True)
    store.close()


@pytest.mark.parametrize("name", ENCODINGS)
def test_old_chunks_are_refused_by_name_wherever_they_come_from(name: str) -> None:
    with pytest.raises(UnsupportedVersionError, match="version 1, this codec reads version 2 only"):
        verify_chunk(OLD[name], len(OLD[name]))


@pytest.mark.usefixtures("old_disk")
def test_a_node_with_old_chunks_on_its_disk_starts_and_has_none_of_them(opened: Opener) -> None:
    node = opened()
    for name in ENCODINGS:
        assert node.lookup(LookupRequest([CHUNK_ID], [name])).answers[0].encoding is None
        with pytest.raises(ChunkNotFoundError), node.open(CHUNK_ID, name) as reader:
            reader.header  # noqa: B018
    assert [progress.damaged for progress in scrub(node)] == [()]


@pytest.mark.usefixtures("old_disk")
def test_what_is_computed_again_takes_the_place_of_old_chunks(opened: Opener) -> None:
    node = opened()
    for name in ENCODINGS:
        node.lookup(LookupRequest([CHUNK_ID], [name]))
        data = b"".join(encode(SPEC, make_kv(SPEC, 16), Encoding.parse(name)).parts)
        put = node.begin_put(CHUNK_ID, name, len(data), options=PutOptions())
        assert put is not None
        put.write(data)
        assert put.commit()
    node = opened()
    for name in ENCODINGS:
        with node.open(CHUNK_ID, name) as reader:
            assert reader.header.encoding.name == name
