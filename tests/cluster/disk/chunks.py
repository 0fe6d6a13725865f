"""Putting sample chunks into a store and getting them back."""

from collections.abc import Iterable
from functools import cache

from kvstore_cluster.disk import Location, RecordMeta, SegmentStore
from kvstore_codec.geometry import Geometry
from kvstore_codec.model_spec import KVDtype
from tests.sample_chunk import SampleChunk, sample_chunk

TINY = Geometry(layers=1, kv_heads=1, head_dim=16, dtype=KVDtype.BFLOAT16)


@cache
def tiny(content: int, version: int = 0) -> SampleChunk:
    """A chunk of a few hundred bytes; another `version` has the same id and other bytes."""
    return sample_chunk(content=content, frame_bytes=20 + version, geometry=TINY)


def meta_of(chunk: SampleChunk, **fields: object) -> RecordMeta:
    return RecordMeta(
        chunk.chunk_id,
        chunk.encoding,
        len(chunk.data),
        chunk.header.header_bytes,
        **fields,  # type: ignore[arg-type]
    )


def append(store: SegmentStore, chunk: SampleChunk, *, sync: bool = True) -> Location:
    return store.append(meta_of(chunk), [memoryview(chunk.data)], sync=sync)


def read(store: SegmentStore, location: Location, size_bytes: int, offset: int = 0) -> bytes:
    data = bytearray(size_bytes)
    store.read(location, offset, [memoryview(data)])
    return bytes(data)


def contents(store: SegmentStore) -> dict[tuple[bytes, str], bytes]:
    """Recovers the store: what it holds, by content id and encoding."""
    return {
        (meta.chunk_id.content_id, meta.encoding): read(store, location, meta.size_bytes)
        for meta, location in list(store.recover().records)
    }


def by_key(chunks: Iterable[SampleChunk]) -> dict[tuple[bytes, str], bytes]:
    return {(chunk.chunk_id.content_id, chunk.encoding): chunk.data for chunk in chunks}
