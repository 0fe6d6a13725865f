"""One connection to the bulk port: receives requests, and sends the node's answers."""

import time
from contextlib import ExitStack
from typing import TypeVar

from google.protobuf.message import DecodeError

from kvstore_api import frames
from kvstore_api.byte_stream import ByteStream
from kvstore_api.frames import FrameKind, pack_header, unpack_header
from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_cluster.node import StorageNode
from kvstore_cluster.put import PendingPut
from kvstore_codec.errors import (
    AbandonedRequestError,
    BusyError,
    ChunkFormatError,
    ChunkNotFoundError,
    FrameRangeError,
    KVStoreError,
    MalformedRequestError,
    PermissionDeniedError,
    RequestError,
    UnauthenticatedError,
)
from kvstore_codec.identity import ChunkId
from kvstore_service.bulk_server.caller import BulkCaller
from kvstore_service.bulk_server.frame_answers import FrameAnswers, receive_cancel
from kvstore_service.chunk_source import ChunkSource
from kvstore_service.identity import Access
from kvstore_service.large_requests import SMALL_BYTES, LargeRequests
from kvstore_service.request_fields import require_few_fields
from kvstore_service.request_log import logged
from kvstore_service.tracing import NodeTracing, traced_read
from kvstore_service.wire import put_arguments, put_refusal, put_reply, read_targets

# Each piece has a time limit. With smaller pieces the cost of the system calls becomes noticeable.
_SEND_BYTES = 4 << 20
# Large enough that the cost of the system calls is negligible.
_RECEIVE_BYTES = 1 << 20

# Of what a refused client still sends. The client may be a stranger, so it is little.
_DISCARD_BYTES = 16 << 10
_DISCARD_S = 2.0
_SHORTEST_S = 0.001

# Time limit for the pieces of a request after its first one: a request of 8 MiB needs 12 Mbit/s.
_REST_S = 5.0

Request = TypeVar("Request", pb.ReadRequest, pb.PutStart)


class RefusedError(Exception):
    """The server refuses a request, and then closes the connection. The message is sent to the client."""


class Session:
    """Serves the requests of one connection one after the other, in one thread."""

    def __init__(
        self,
        node: StorageNode,
        stream: ByteStream,
        source: ChunkSource,
        large: LargeRequests,
        *,
        access: Access,
        peer: str,
        patience_s: float,
        idle_s: float,
        stranger_s: float,
        tracing: NodeTracing | None = None,
    ) -> None:
        """A client that is not identified `stranger_s` after the construction is disconnected."""
        self._greeted = False
        self._identified_by_s = time.monotonic() + stranger_s
        self._tracing = tracing
        self._caller = BulkCaller(access, stream.peer_names)
        self._node = node
        self._stream = stream
        self._source = source
        self._large = large
        self._peer = peer
        self._patience_s = patience_s
        self._idle_s = idle_s
        self._header = bytearray(frames.HEADER_BYTES)

    @property
    def caller(self) -> BulkCaller:
        return self._caller

    def greet(self) -> None:
        """Performs the TLS handshake and receives the client's preface. Raises RefusedError for another protocol or
        version, and OSError."""
        self._stream.handshake(self._stranger_left_s())
        preface = bytearray(len(frames.PREFACE))
        self._stream.receive_into(preface, self._stranger_left_s())
        if preface != frames.PREFACE:
            raise RefusedError(
                f"this is the bulk port of a storage node, version {frames.VERSION}; "
                "update whichever side is older, or use its gRPC port"
            )
        self._greeted = True
        self._caller.recognise()

    def wait(self) -> None:
        """Blocks until a request begins. Raises OSError if the client disconnects or is idle for too long. A client
        that has not said who it is must do so soon."""
        self._stream.receive_into(self._header, self._limit_s(self._idle_s))

    def serve(self) -> None:
        """Answers the request that `wait` has seen. Raises RefusedError, and OSError if the client disconnects or is
        too slow."""
        self._stream.affinity.join_peer()
        header = unpack_header(self._header)
        try:
            if header.kind == FrameKind.TOKEN:
                _require_length(header.length, frames.MAX_TOKEN_BYTES)
                self._caller.present(self._message(header.length))
                return
            self._caller.require()
            if header.kind == FrameKind.READ:
                _require_length(header.length, frames.MAX_READ_REQUEST_BYTES)
                self._read(header.length)
            elif header.kind == FrameKind.PUT:
                _require_length(header.length, frames.MAX_PUT_START_BYTES)
                self._put(_parsed(pb.PutStart(), self._message(header.length)))
            elif header.kind == FrameKind.CANCEL:  # of a read that has ended in the meantime
                receive_cancel(self._stream, header.length, self._patience_s)
            else:
                raise RefusedError(f"a request begins with READ or PUT, not with {header.kind}")
        except (MalformedRequestError, UnauthenticatedError, PermissionDeniedError) as error:
            raise RefusedError(str(error)) from error

    def refuse(self, reason: str) -> None:
        """Sends the reason, then reads until the client closes: closing first could discard the unread reason."""
        text = reason.encode()[: frames.MAX_TEXT_BYTES]
        self._stream.send([pack_header(FrameKind.REFUSED, len(text)), text], self._patience_s)
        self._stream.end_sending()
        scratch = bytearray(_DISCARD_BYTES)
        is_stranger = not (self._greeted and self._caller.is_known)
        until = time.monotonic() + (_DISCARD_S if is_stranger else self._patience_s)
        while (left_s := until - time.monotonic()) > 0:
            self._stream.receive_into(scratch, left_s)

    def _message(self, length: int) -> bytearray:
        message = bytearray(length)
        self._stream.receive_into(message, self._limit_s(self._patience_s))
        return message

    def _limit_s(self, known_s: float) -> float:
        """`known_s` for a client that is identified, or need not be."""
        return known_s if self._caller.is_known else self._stranger_left_s()

    def _stranger_left_s(self) -> float:
        """How long the client may still take to say who it is. Not 0, with which a socket would not block."""
        return max(_SHORTEST_S, min(self._patience_s, self._identified_by_s - time.monotonic()))

    def _large_message(self, length: int, kept: ExitStack) -> bytearray:
        """Receives a large request. Memory and a share of the limit on large requests are taken for received bytes, not
        for announced ones. After the first piece, the rest must arrive within _REST_S. Raises BusyError."""
        message = bytearray()
        until = time.monotonic() + self._patience_s
        while length > len(message):
            piece = bytearray(min(length - len(message), _RECEIVE_BYTES))
            self._stream.receive_into(piece, until - time.monotonic())
            kept.enter_context(self._large.kept(self._peer, size_bytes=len(piece)))
            until = min(until, time.monotonic() + _REST_S)
            message += piece
        return message

    # ---- reads

    def _read(self, size_bytes: int) -> None:
        try:
            if size_bytes <= SMALL_BYTES:
                request = _parsed(pb.ReadRequest(), self._message(size_bytes))
                self._send_ranges(request, *read_targets(request))
            else:
                self._read_large(size_bytes)
        except BusyError as error:
            raise RefusedError(str(error)) from error
        except AbandonedRequestError as error:
            raise ConnectionAbortedError(str(error)) from error

    def _read_large(self, size_bytes: int) -> None:
        with ExitStack() as kept:
            message = self._large_message(size_bytes, kept)
            with self._large.admitted(self._peer, self._stream.is_open, size_bytes=size_bytes):
                request = _parsed(pb.ReadRequest(), message)
                chunks, encodings = read_targets(request)
            del message
            self._send_ranges(request, chunks, encodings)

    def _send_ranges(self, request: pb.ReadRequest, chunks: list[ChunkId], encodings: list[str]) -> None:
        with logged("Read", request.request_id, streams=True), traced_read(self._tracing, request, "bulk"):
            self._send_each(request, chunks, encodings)

    def _send_each(self, request: pb.ReadRequest, chunks: list[ChunkId], encodings: list[str]) -> None:
        tenant = self._caller.acting_for(request.tenant)
        if request.any_order:
            answers = FrameAnswers(
                self._stream, self._source, send_bytes=_SEND_BYTES, patience_s=self._patience_s
            )
            answers.send(request, chunks, encodings, tenant)
            return
        for index, wanted in enumerate(request.ranges):
            self._send_range(index, chunks[wanted.chunk], encodings[wanted.chunk], wanted, tenant)

    def _send_range(
        self, index: int, chunk_id: ChunkId, encoding: str, wanted: pb.ReadRange, tenant: str
    ) -> None:
        """Sends one range of frames. Its chunk stays in memory until the kernel has all its bytes."""
        began = False
        try:
            with self._source.open(chunk_id, encoding, tenant=tenant) as reader:
                first, count = wanted.first_frame, wanted.frame_count
                header = pack_header(FrameKind.RANGE, reader.range_bytes(first, count), range_index=index)
                for piece in reader.pieces(first, count, _SEND_BYTES):
                    self._stream.send(piece if began else [header, *piece], self._patience_s)
                    began = True
        except (ChunkNotFoundError, ChunkFormatError) as error:
            if began:  # the header has announced the missing bytes, so the connection cannot go on
                raise ConnectionAbortedError(str(error)) from error
            self._send_failure(index, pb.READ_STATUS_NOT_FOUND)
        except FrameRangeError:
            self._send_failure(index, pb.READ_STATUS_INVALID_RANGE)

    def _send_failure(self, index: int, status: pb.ReadStatus) -> None:
        self._stream.send(
            [pack_header(FrameKind.RANGE, 0, status=status, range_index=index)], self._patience_s
        )

    # ---- puts

    def _put(self, start: pb.PutStart) -> None:
        try:
            put = self._node.begin_put(*put_arguments(start, self._caller.acting_for(start.tenant)))
        except RequestError:
            raise
        except KVStoreError as error:
            self._skip(start.size_bytes)
            self._reply(put_refusal(error))
            return
        if put is None:
            self._skip(start.size_bytes)
            self._reply(put_reply(stored=False))
            return
        try:
            self._receive(put)
            stored = put.commit()
        except KVStoreError as error:
            self._reply(put_refusal(error))
        else:
            self._reply(put_reply(stored=stored))
        finally:
            put.revoke()  # no effect after a commit

    def _receive(self, put: PendingPut) -> None:
        """Receives the chunk directly into the memory reserved for it."""
        for view in put.views():
            for begin in range(0, len(view), _RECEIVE_BYTES):
                piece = view[begin : begin + _RECEIVE_BYTES]
                self._stream.receive_into(piece, self._patience_s)
                put.advance(len(piece))

    def _skip(self, size_bytes: int) -> None:
        """Receives and discards the bytes of a chunk that is not stored, because the next request follows them."""
        scratch = memoryview(bytearray(min(size_bytes, _RECEIVE_BYTES)))
        while size_bytes:
            piece = scratch[: min(size_bytes, len(scratch))]
            self._stream.receive_into(piece, self._patience_s)
            size_bytes -= len(piece)

    def _reply(self, answer: pb.PutReply) -> None:
        answer.message = answer.message.encode()[: frames.MAX_TEXT_BYTES // 2].decode(errors="ignore")
        reply = answer.SerializeToString()
        self._stream.send([pack_header(FrameKind.PUT_REPLY, len(reply)), reply], self._patience_s)


def _parsed(message: Request, data: bytearray) -> Request:
    name = type(message).__name__
    try:
        require_few_fields(data, name)
        message.ParseFromString(bytes(data))
    except DecodeError as error:
        raise MalformedRequestError(f"not a {name}") from error
    return message


def _require_length(length: int, limit_bytes: int) -> None:
    if length > limit_bytes:
        raise RefusedError(f"a request has {length} bytes; at most {limit_bytes}")
