"""This service as a store of values: puts and gets valid chunks over the client's transports."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from blake3 import blake3

from kvstore_api.chunk_refs import chunk_ref
from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_api.v1 import kvstore_pb2_grpc as rpc
from kvstore_client.connector import Connector
from kvstore_client.transport import BulkTransport, Connections, GrpcTransport, ReceiveMemory, Transport
from kvstore_codec.chunk import ChunkHeader, write_header
from kvstore_codec.encoding import Encoding
from kvstore_codec.geometry import Geometry
from kvstore_codec.identity import ChunkId, ContentId, PrefixId
from kvstore_codec.model_spec import KVDtype

ENCODING = "exact-raw"
TIMEOUT_S = 30.0
_MESSAGE_BYTES = 64 << 20
_PIECE_BYTES = 1 << 20
# Two periods of 256 tokens in frames of 64 tokens: eight frames, as in a chunk of a small model.
_GEOMETRY = Geometry(layers=8, kv_heads=4, head_dim=64, dtype=KVDtype.BFLOAT16)


@dataclass(frozen=True, slots=True)
class Chunk:
    """A chunk with random frames."""

    header: ChunkHeader
    parts: tuple[bytes, ...]
    ref: pb.ChunkRef

    @classmethod
    def of_size(cls, key: int, size_bytes: int, noise: random.Random) -> "Chunk":
        """Makes a valid chunk of exactly `size_bytes`, header included. Its frames are noise, because nothing decodes
        them."""
        chunk_id = ChunkId(
            ContentId(blake3(b"content %d" % key).digest()), PrefixId(blake3(b"prefix %d" % key).digest())
        )
        count = _GEOMETRY.frame_count
        header_bytes = _header(chunk_id, [b""] * count)[0].header_bytes
        lengths = [(size_bytes - header_bytes) // count] * count
        lengths[-1] = size_bytes - header_bytes - sum(lengths[:-1])
        frames = [noise.randbytes(length) for length in lengths]
        header, data = _header(chunk_id, frames)
        return cls(
            header,
            (data, *frames),
            chunk_ref(chunk_id),
        )

    def steps(self) -> Iterator[pb.PutRequest | memoryview]:
        """The messages of a put of this chunk."""
        start = pb.PutStart(chunk=self.ref, encoding=ENCODING, size_bytes=self.header.size_bytes)
        yield pb.PutRequest(start=start)
        for part in self.parts:
            view = memoryview(part)
            for begin in range(0, len(view), _PIECE_BYTES):
                yield view[begin : begin + _PIECE_BYTES]
        yield pb.PutRequest(end=pb.PutEnd())


def _header(chunk_id: ChunkId, frames: Sequence[bytes]) -> tuple[ChunkHeader, bytes]:
    return write_header(bytes(32), chunk_id, Encoding.parse(ENCODING), _GEOMETRY, frames)


class KVStore:
    """Client of one storage node, over its bulk port and over gRPC."""

    def __init__(self, storage: str, bulk: str, connector: Connector) -> None:
        channel = connector.channel(storage, [("grpc.max_receive_message_length", _MESSAGE_BYTES)])
        host, _, port = bulk.rpartition(":")
        self._stub = rpc.StorageStub(channel)
        self._grpc = GrpcTransport(channel)
        connections = Connections(host, int(port), connector.tls_context, connector.server_name(host))
        self._bulk = BulkTransport(connections, ReceiveMemory())
        self._chunks: dict[int, Chunk] = {}

    def value(self, key: int, size_bytes: int, noise: random.Random) -> Chunk:
        chunk = self._chunks[key] = Chunk.of_size(key, size_bytes, noise)
        return chunk

    def content(self, value: Chunk) -> bytes:
        return b"".join(value.parts)

    def put(self, key: int, value: Chunk) -> None:  # noqa: ARG002
        _put(self._bulk, value)

    def put_over_grpc(self, key: int, value: Chunk) -> None:  # noqa: ARG002
        _put(self._grpc, value)

    def get(self, key: int, size_bytes: int) -> memoryview:  # noqa: ARG002
        return _get(self._bulk, self._chunks[key])

    def get_over_grpc(self, key: int, size_bytes: int) -> memoryview:  # noqa: ARG002
        return _get(self._grpc, self._chunks[key])

    def get_verified(self, key: int, size_bytes: int) -> memoryview:  # noqa: ARG002
        chunk = self._chunks[key]
        data = _get(self._bulk, chunk)
        for frame in range(_GEOMETRY.frame_count):
            offset, length = chunk.header.range_bytes(frame, 1)
            chunk.header.verify_frame(frame, data[offset : offset + length])
        return data

    def delete(self, key: int) -> None:
        self._stub.Delete(pb.DeleteRequest(chunks=[self._chunks[key].ref]), timeout=TIMEOUT_S)


def _put(transport: Transport, chunk: Chunk) -> None:
    (reply,) = transport.put(chunk.steps(), TIMEOUT_S)
    if reply.status != pb.PUT_STATUS_STORED:
        raise RuntimeError(f"the chunk was not stored: {pb.PutStatus.Name(reply.status)} {reply.message}")


def _get(transport: Transport, chunk: Chunk) -> memoryview:
    request = pb.ReadRequest(
        chunks=[chunk.ref], encodings=[ENCODING], ranges=[pb.ReadRange()], piece_bytes=_PIECE_BYTES
    )
    pieces = [piece.data for piece in transport.read(request, TIMEOUT_S)]
    return pieces[0] if len(pieces) == 1 else memoryview(b"".join(pieces))
