"""A storage node with a disk, and small chunks for it."""

from collections.abc import Callable
from typing import Any

from kvstore_cluster.lookup import LookupRequest
from kvstore_cluster.node import StorageNode
from kvstore_cluster.put import PutOptions
from tests.sample_chunk import SampleChunk, sample_chunk

MEMORY = 1 << 20
DISK = 16 << 20
SEGMENT = 1 << 20
BLOCK = 4 << 10
FRAME = 6000  # chunks of about 70 KB: fourteen fit into memory
Opener = Callable[..., Any]


def chunk_of(number: int, encoding: str = "exact-zstd") -> SampleChunk:
    return sample_chunk(content=number, encoding=encoding, frame_bytes=FRAME)


def put(node: StorageNode, chunk: SampleChunk, **options: object) -> bool:
    pending = node.begin_put(
        chunk.chunk_id,
        chunk.encoding,
        len(chunk.data),
        options=PutOptions(**options),  # type: ignore[arg-type]
    )
    if pending is None:
        return False
    data = memoryview(chunk.data)
    for view in pending.views():
        view[:] = data[: view.nbytes]
        data = data[view.nbytes :]
        pending.advance(view.nbytes)
    return pending.commit()


def read(node: StorageNode, chunk: SampleChunk, first: int = 0, count: int = 0) -> bytes:
    with node.open(chunk.chunk_id, chunk.encoding) as reader:
        return b"".join(view for piece in reader.pieces(first, count, 10_000) for view in piece)


def stored(node: StorageNode, chunk: SampleChunk) -> bool:
    return (
        node.lookup(LookupRequest([chunk.chunk_id], [chunk.encoding], peek=True)).answers[0].encoding
        is not None
    )
