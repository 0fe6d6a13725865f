"""Transport over the Storage service's streams, which works wherever gRPC does."""

import math
from collections.abc import Iterator
from typing import Generic, TypeVar

import grpc

from kvstore_api.bulk import ReadPiece, decode_read_reply, encode_put_request
from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_client.transport.base import Memory, Places
from kvstore_codec.errors import TransferError

_SERVICE = pb.DESCRIPTOR.services_by_name["Storage"].full_name
_REASONS = {
    grpc.StatusCode.CANCELLED: "cancelled",
    grpc.StatusCode.DEADLINE_EXCEEDED: "timeout",
    grpc.StatusCode.UNAVAILABLE: "unreachable",
}
Message = TypeVar("Message", covariant=True)


class GrpcTransport:
    """The two calls that carry KV bytes, without the copies that the generated classes make."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._read = channel.unary_stream(
            f"/{_SERVICE}/Read",
            request_serializer=pb.ReadRequest.SerializeToString,
            response_deserializer=decode_read_reply,
        )
        self._put = channel.stream_stream(
            f"/{_SERVICE}/Put",
            request_serializer=encode_put_request,
            response_deserializer=pb.PutReply.FromString,
        )

    def read(
        self,
        request: pb.ReadRequest,
        timeout_s: float,
        memory: Memory | None = None,  # noqa: ARG002 (gRPC receives into messages)
    ) -> "GrpcStream[ReadPiece]":
        return GrpcStream(self._read(request, timeout=timeout_s))

    def read_frames(
        self,
        request: pb.ReadRequest,
        timeout_s: float,
        places: Places,
    ) -> "GrpcStream[ReadPiece]":
        request.any_order = True
        return _FrameStream(self._read(request, timeout=timeout_s), len(request.ranges), places)

    def put(self, steps: Iterator[pb.PutRequest | memoryview], timeout_s: float) -> "GrpcStream[pb.PutReply]":
        return GrpcStream(self._put(steps, timeout=timeout_s))


class GrpcStream(Generic[Message]):
    """Answers of a call; its errors are raised as TransferError."""

    moved_at_s = -math.inf
    incomplete_bytes = 0

    def __init__(self, call: grpc.Call) -> None:
        self._call = call

    def __iter__(self) -> Iterator[Message]:
        try:
            yield from self._call
        except grpc.RpcError as error:
            code = error.code()
            reason = _REASONS.get(code, f"rpc_{code.name.lower()}")
            raise TransferError(reason, error.details() or code.name) from error

    def cancel(self) -> None:
        self._call.cancel()


class _FrameStream(GrpcStream[ReadPiece]):
    """Ranges of a read in any order. The node cannot be told about single cancelled ranges, so the call goes on until
    none of the ranges that are left is wanted."""

    def __init__(self, call: grpc.Call, ranges: int, places: Places) -> None:
        super().__init__(call)
        self._wanted = set(range(ranges))
        self._places = places

    def __iter__(self) -> Iterator[ReadPiece]:
        current: int | None = None
        for piece in super().__iter__():
            if current is not None and current != piece.range:
                self._wanted.discard(current)  # its last piece has come
            current = piece.range
            yield piece
            self._wanted.difference_update(self._places.cancelled())
            if not self._wanted:
                raise TransferError("cancelled", "nothing more of this read is wanted")
