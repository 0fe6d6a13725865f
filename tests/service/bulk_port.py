"""A node's bulk port, and what its clients send and receive."""

import contextlib
import socket
import time
from collections.abc import Callable, Iterator

from kvstore_api.frames import HEADER_BYTES, PREFACE, FrameKind, pack_header, unpack_header
from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_cluster.arena import Arena
from kvstore_cluster.node import StorageNode
from kvstore_service.bulk_server import BulkServer
from kvstore_service.listen import Address
from tests.sample_chunk import SampleChunk, sample_chunk

HOST = "127.0.0.1"
CHUNK = sample_chunk()


class Port:
    def __init__(self, **options: float) -> None:
        self.node = StorageNode("node-0", Arena(64 << 20, 4 << 10))
        self.server = BulkServer(self.node, Address(HOST, 0), **options)  # type: ignore[arg-type]

    @contextlib.contextmanager
    def connected(self, preface: bytes = PREFACE) -> Iterator[socket.socket]:
        host, _, port = self.server.address.rpartition(":")
        with socket.create_connection((host, int(port)), 5) as connected:
            connected.sendall(preface)
            yield connected


@contextlib.contextmanager
def served_port(**options: float) -> Iterator[Port]:
    port = Port(**options)
    yield port
    port.server.stop(0)
    port.node.check_integrity()
    assert not port.server._connections


def ref(chunk: SampleChunk) -> pb.ChunkRef:
    return pb.ChunkRef(content_id=chunk.chunk_id.content_id, prefix_id=chunk.chunk_id.prefix_id)


def put_frame(chunk: SampleChunk = CHUNK, size_bytes: int | None = None) -> bytes:
    size_bytes = len(chunk.data) if size_bytes is None else size_bytes
    start = pb.PutStart(chunk=ref(chunk), encoding=chunk.encoding, size_bytes=size_bytes).SerializeToString()
    return pack_header(FrameKind.PUT, len(start)) + start


def read_frame(count: int = 1, **fields: object) -> bytes:
    request = pb.ReadRequest(chunks=[ref(CHUNK)], encodings=[CHUNK.encoding], ranges=[pb.ReadRange()] * count)
    request.MergeFrom(pb.ReadRequest(**fields))  # type: ignore[arg-type]
    message = request.SerializeToString()
    return pack_header(FrameKind.READ, len(message)) + message


def received(connected: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        piece = connected.recv(count - len(data))
        assert piece, data
        data += piece
    return data


def answer(connected: socket.socket) -> tuple[int, bytes]:
    """(kind, message) of the next one."""
    header = unpack_header(bytearray(received(connected, HEADER_BYTES)))
    return header.kind, received(connected, header.length)


def reply(connected: socket.socket) -> pb.PutReply:
    kind, message = answer(connected)
    assert kind == FrameKind.PUT_REPLY
    return pb.PutReply.FromString(message)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
