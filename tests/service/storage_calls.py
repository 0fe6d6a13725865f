"""Calls of the Storage service with the generated client, as the tests make them."""

import time
from collections.abc import Callable, Iterator

from kvstore_api.chunk_refs import chunk_ref
from kvstore_api.v1 import kvstore_pb2 as pb
from tests.sample_chunk import SampleChunk
from tests.service.conftest import ServedNode

SERVICE = "kvstore.v1.Storage"


def ref(chunk: SampleChunk) -> pb.ChunkRef:
    return chunk_ref(chunk.chunk_id)


def start(chunk: SampleChunk, size_bytes: int | None = None) -> pb.PutRequest:
    size_bytes = len(chunk.data) if size_bytes is None else size_bytes
    return pb.PutRequest(start=pb.PutStart(chunk=ref(chunk), encoding=chunk.encoding, size_bytes=size_bytes))


def data(chunk: SampleChunk, piece_bytes: int = 5000) -> Iterator[pb.PutRequest]:
    for position in range(0, len(chunk.data), piece_bytes):
        yield pb.PutRequest(data=chunk.data[position : position + piece_bytes])


END = pb.PutRequest(end=pb.PutEnd())
REVOKE = pb.PutRequest(revoke=pb.PutRevoke())


def steps(*chunks: SampleChunk) -> Iterator[pb.PutRequest]:
    for chunk in chunks:
        yield start(chunk)
        yield from data(chunk)
        yield END


def statuses(storage: ServedNode, requests) -> list[int]:
    return [reply.status for reply in storage.stub.Put(iter(requests))]


def read(storage: ServedNode, chunks, ranges, piece_bytes: int = 0) -> dict[int, bytes]:
    """The bytes of every range that came; pieces must come in order."""
    request = pb.ReadRequest(
        chunks=[ref(chunk) for chunk in chunks],
        encodings=[chunk.encoding for chunk in chunks],
        ranges=[pb.ReadRange(chunk=c, first_frame=first, frame_count=count) for c, first, count in ranges],
        piece_bytes=piece_bytes,
    )
    parts: dict[int, bytes] = {}
    for reply in storage.stub.Read(request):
        assert list(parts) == sorted(parts)
        if reply.status == pb.READ_STATUS_OK:
            assert not piece_bytes or len(reply.data) <= piece_bytes
            parts[reply.range] = parts.get(reply.range, b"") + reply.data
        else:
            parts[reply.range] = pb.ReadStatus.Name(reply.status).encode()
    return parts


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
