"""Answers a read with `any_order` on the bulk port: sends ranges as they are read, and obeys the client's cancellations
meanwhile."""

from collections.abc import Sequence

from kvstore_api import frames
from kvstore_api.byte_stream import ByteStream
from kvstore_api.frames import FrameKind, pack_header, unpack_header
from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_codec.errors import MalformedRequestError
from kvstore_codec.identity import ChunkId
from kvstore_service.chunk_source import ChunkSource, OpenFrames
from kvstore_service.wire import range_failure


class FrameAnswers:
    """Sends the ranges of one request."""

    def __init__(
        self, stream: ByteStream, source: ChunkSource, *, send_bytes: int, patience_s: float
    ) -> None:
        """Sends pieces of at most `send_bytes`, each of which the client must take within `patience_s`."""
        self._stream, self._source = stream, source
        self._send_bytes, self._patience_s = send_bytes, patience_s

    def send(
        self, request: pb.ReadRequest, chunks: Sequence[ChunkId], encodings: Sequence[str], tenant: str
    ) -> None:
        """Raises MalformedRequestError, and OSError if the client disconnects or is too slow."""
        with self._source.read_frames(chunks, encodings, request.ranges, tenant) as read:
            for data in read:
                self._receive_cancels(read, len(request.ranges))
                if data.failure is not None:
                    status = range_failure(data.failure)
                    self._send([pack_header(FrameKind.FRAMES, 0, status=status, range_index=data.index)])
                    continue
                waiting: list[memoryview | bytes] = [
                    pack_header(FrameKind.FRAMES, data.size_bytes, range_index=data.index)
                ]
                for piece in data.pieces(self._send_bytes):
                    self._send([*waiting, *piece])
                    waiting.clear()
                if waiting:
                    self._send(waiting)

    def _send(self, views: Sequence[memoryview | bytes]) -> None:
        self._stream.send(views, self._patience_s)

    def _receive_cancels(self, read: OpenFrames, ranges: int) -> None:
        """Receives the cancellations that have arrived. Does not wait for others."""
        while self._stream.has_arrived():
            data = bytearray(frames.HEADER_BYTES)
            self._stream.receive_into(data, self._patience_s)
            header = unpack_header(data)
            if header.kind != FrameKind.CANCEL:
                raise MalformedRequestError("during a read with any_order only CANCEL may be sent")
            read.drop(
                index
                for index in receive_cancel(self._stream, header.length, self._patience_s)
                if index < ranges
            )


def receive_cancel(stream: ByteStream, length: int, timeout_s: float) -> list[int]:
    """Receives the body of a CANCEL. Returns the indices of its ranges. Raises MalformedRequestError."""
    if length > frames.MAX_FRAME_RANGES // 8:
        raise MalformedRequestError(
            f"a CANCEL has {length} bytes; a read has at most {frames.MAX_FRAME_RANGES} ranges"
        )
    bitmap = bytearray(length)
    stream.receive_into(bitmap, timeout_s)
    return frames.unpack_bits(bitmap)
