"""Chunk names on the wire, for both ends."""

from typing import Protocol

from kvstore_api.v1 import kvstore_pb2 as pb


class ChunkName(Protocol):
    """Names of a chunk, 32 bytes each."""

    @property
    def content_id(self) -> bytes: ...
    @property
    def prefix_id(self) -> bytes: ...


def chunk_ref(name: ChunkName) -> pb.ChunkRef:
    return pb.ChunkRef(content_id=name.content_id, prefix_id=name.prefix_id)
