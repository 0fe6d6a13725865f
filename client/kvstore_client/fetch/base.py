"""Data that the stages of a fetch pass to each other."""

from collections.abc import Sequence
from dataclasses import dataclass

from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_client.match import StoredChunk, Variant
from kvstore_client.request_id import current_request_id
from kvstore_codec.encoding import Encoding


@dataclass(frozen=True, slots=True)
class ReadTask:
    """One read: neighbouring frames of one period of a chunk's variant. Passes through all stages."""

    chunk_index: int
    chunk: StoredChunk
    variant: Variant
    first_frame: int
    frame_count: int
    layers: slice
    tokens: slice
    """Positions of these frames in the destination."""

    @property
    def size_bytes(self) -> int:
        return self.variant.header.range_bytes(self.first_frame, self.frame_count)[1]

    @property
    def encoding(self) -> Encoding:
        return self.variant.header.encoding

    @property
    def label(self) -> str:
        return f"chunk {self.chunk_index} layers {self.layers.start}-{self.layers.stop - 1}"


@dataclass(frozen=True, slots=True)
class ReceivedFrames:
    task: ReadTask
    data: memoryview


def read_request(tasks: Sequence[ReadTask], piece_bytes: int = 0, tenant: str = "") -> pb.ReadRequest:
    """A read of these ranges of a tenant's chunks from one node, in pieces of at most `piece_bytes` (0: as the node
    likes), for the request that this thread works for."""
    request = pb.ReadRequest(piece_bytes=piece_bytes, tenant=tenant, request_id=current_request_id())
    positions: dict[tuple[int, str], int] = {}
    for task in tasks:
        key = task.chunk_index, task.encoding.name
        if key not in positions:
            positions[key] = len(positions)
            chunk_id = task.chunk.chunk_id
            request.chunks.add(content_id=chunk_id.content_id, prefix_id=chunk_id.prefix_id)
            request.encodings.append(task.encoding.name)
        request.ranges.add(chunk=positions[key], first_frame=task.first_frame, frame_count=task.frame_count)
    return request
