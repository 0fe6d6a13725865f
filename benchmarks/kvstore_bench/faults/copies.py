"""Asks each node directly for its chunks and their bytes, without client and placement."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import grpc

from kvstore_api.chunk_refs import chunk_ref
from kvstore_api.placement import Member
from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_api.v1 import kvstore_pb2_grpc as rpc
from kvstore_bench.faults.documents import ENCODING
from kvstore_client.transport import GrpcTransport
from kvstore_codec.identity import ChunkId

_TIMEOUT_S = 10.0
_LOOKUP_CHUNKS = 1024
_READ_CHUNKS = 64


class Copies:
    """The copies of chunks in a cluster. A context manager with one connection to the coordinator and to each node.
    Methods raise grpc.RpcError, and `read` raises TransferError."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._open = ExitStack()
        self._channels: dict[str, grpc.Channel] = {}

    def members(self) -> list[Member]:
        stub = rpc.CoordinatorStub(self._channel(self._address))
        reply = stub.Membership(pb.MembershipRequest(), timeout=_TIMEOUT_S)
        return [
            Member(m.node_id, m.endpoint, m.weight, domain=m.domain, draining=m.draining)
            for m in reply.members
        ]

    def repair(self) -> None:
        """Starts a round of repair on all nodes."""
        rpc.CoordinatorStub(self._channel(self._address)).Repair(pb.RepairRequest(), timeout=_TIMEOUT_S)

    def held(self, member: Member, chunk_ids: Sequence[ChunkId]) -> list[bool]:
        """Whether the node has each of these chunks."""
        stub = rpc.StorageStub(self._channel(member.endpoint))
        found: list[bool] = []
        for begin in range(0, len(chunk_ids), _LOOKUP_CHUNKS):
            refs = _refs(chunk_ids[begin : begin + _LOOKUP_CHUNKS])
            request = pb.LookupRequest(chunks=refs, encodings=[ENCODING], peek=True)
            found += [bool(a.encoding) for a in stub.Lookup(request, timeout=_TIMEOUT_S).answers]
        return found

    def read(self, member: Member, chunk_ids: Sequence[ChunkId]) -> Iterator[bytes]:
        """All bytes of each chunk on the node; empty if the node lacks it."""
        transport = GrpcTransport(self._channel(member.endpoint))
        for begin in range(0, len(chunk_ids), _READ_CHUNKS):
            refs = _refs(chunk_ids[begin : begin + _READ_CHUNKS])
            request = pb.ReadRequest(
                chunks=refs,
                encodings=[ENCODING] * len(refs),
                ranges=[pb.ReadRange(chunk=index) for index in range(len(refs))],
            )
            parts: list[list[memoryview]] = [[] for _ in refs]
            for piece in transport.read(request, _TIMEOUT_S):
                parts[piece.range].append(piece.data)
            yield from (b"".join(pieces) for pieces in parts)

    def close(self) -> None:
        self._open.close()
        self._channels.clear()

    def _channel(self, endpoint: str) -> grpc.Channel:
        if endpoint not in self._channels:
            channel = grpc.insecure_channel(endpoint, [("grpc.enable_http_proxy", 0)])
            self._channels[endpoint] = self._open.enter_context(channel)
        return self._channels[endpoint]


def _refs(chunk_ids: Sequence[ChunkId]) -> list[pb.ChunkRef]:
    return list(map(chunk_ref, chunk_ids))
