"""Receives ranges of a FrameRead from one node."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence

from kvstore_api.bulk import ReadPiece
from kvstore_api.placement import Member
from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_client.cluster_view import ClusterView
from kvstore_client.fetch.base import read_request
from kvstore_client.frames.read import FrameRead
from kvstore_client.metrics import ClientMetrics
from kvstore_client.miss_reason import MissReason
from kvstore_client.planning import Links
from kvstore_client.signatures import Signatures
from kvstore_client.transport import ReadStream, ReceiveMemory
from kvstore_client.transport.memory import LARGEST_BYTES
from kvstore_client.watch import Watch
from kvstore_codec.errors import ChunkFormatError, NodeUnavailableError, SignatureError, TransferError


class NodeRead:
    """One request to one node. Used by one thread, apart from `check` and `cancel`. In what it passes to the transport,
    the index of a range is its position in this request."""

    def __init__(
        self,
        read: FrameRead,
        member: Member,
        indices: Sequence[int],
        *,
        buffers: Sequence[memoryview] | None,
        memory: ReceiveMemory,
        metrics: ClientMetrics,
        links: Links,
        signatures: Signatures,
        patience_s: float,
    ) -> None:
        """Ranges are received into `buffers`, or into `memory` without them. `links` learns how fast they arrive. The
        read ends when nothing arrives for `patience_s`."""
        self._read, self._member, self._indices = read, member, indices
        self._buffers, self._memory, self._metrics = buffers, memory, metrics
        self._links, self._signatures, self._patience_s = links, signatures, patience_s
        self._positions = {index: position for position, index in enumerate(indices)}
        self._heard = 0
        self._placed: set[int] = set()
        self._parts: list[memoryview] = []
        """Pieces of the range that is arriving, which is not complete."""
        self._arriving: int | None = None
        """Position of that range; None when no range is arriving."""
        self._failed: dict[int, MissReason] = {}
        self._stream: ReadStream | None = None
        self._moved_at_s = time.monotonic()
        self._is_silent = self._is_closed = False
        self.why = ""
        """Why the request ended early, for people."""

    def run(self, view: ClusterView, watch: Watch) -> dict[int, MissReason]:
        """Receive the ranges. Returns those that are not complete, with the reason."""
        reason = MissReason.PROTOCOL
        request = read_request([self._read.tasks[index] for index in self._indices], tenant=view.tenant)
        request.traceparent = self._read.traceparent
        try:
            stream = self._stream = view.transport(self._member).read_frames(request, self._read.left_s, self)
            with watch.over(self):
                self._receive(stream)
        except NodeUnavailableError:
            reason = MissReason.CLOSED
        except TransferError as error:
            reason = self._reason(error)
            self.why = (
                f"a read of frames from the node at {self._member.endpoint} broke off ({reason}): {error}"
            )
        except RuntimeError as error:  # this process has no thread left
            reason, self.why = MissReason.NO_RESOURCES, str(error)
        return {index: self._failed.get(index, reason) for index in self._read.put_back(self._indices)}

    def place(self, index: int, size_bytes: int) -> memoryview:
        """Implements `Places`. Ranges that are not wanted any more go to memory that nobody reads."""
        number = self._indices[index]
        task_bytes = self._read.tasks[number].size_bytes
        if size_bytes != task_bytes:
            raise TransferError("protocol", f"{size_bytes} bytes were sent for frames of {task_bytes} bytes")
        if self._read.begin(number):
            self._placed.add(number)
            if self._buffers is not None:
                return self._buffers[number][:size_bytes]
        if size_bytes > LARGEST_BYTES:
            return memoryview(bytearray(size_bytes))
        return self._memory.take(size_bytes)

    def cancelled(self) -> Collection[int]:
        """Implements `Places`."""
        news = self._read.cancelled(self._heard)
        self._heard += len(news)
        return [self._positions[index] for index in news if index in self._positions]

    def check(self) -> None:
        """Implements `Watched`."""
        stream = self._stream
        if stream is None:
            return
        if time.monotonic() - max(self._moved_at_s, stream.moved_at_s) > self._patience_s:
            self._is_silent = True
            stream.cancel()

    def cancel(self) -> None:
        """Implements `Watched`: the client was closed."""
        self._is_closed = True
        if self._stream is not None:
            self._stream.cancel()

    def _receive(self, stream: ReadStream) -> None:
        try:
            first = True
            for piece in stream:
                self._observe(len(piece.data), first=first)
                first = False
                if piece.range >= len(self._indices):
                    raise TransferError("protocol", f"range {piece.range} was not requested")
                if self._arriving not in (None, piece.range):
                    raise TransferError(
                        "protocol", f"range {piece.range} began within range {self._arriving}"
                    )
                self._take(self._indices[piece.range], piece)
        finally:
            stream.cancel()

    def _observe(self, size_bytes: int, *, first: bool) -> None:
        """Bytes have arrived, or word of a range that is gone."""
        now_s = time.monotonic()
        seconds, self._moved_at_s = now_s - self._moved_at_s, now_s
        if size_bytes:
            if first:
                seconds = self._links.first_piece_s(self._member.endpoint, size_bytes, seconds)
            self._links.observe(self._member.endpoint, size_bytes, seconds)

    def _take(self, index: int, piece: ReadPiece) -> None:
        """Accept a whole range, or a piece of one. Raises TransferError for more bytes than the range has."""
        if piece.status != pb.READ_STATUS_OK:
            # A node that sends while it reads may find out in the middle of a range that it cannot read on.
            self._parts, self._arriving = [], None
            self._failed[index] = MissReason.GONE
            return
        task = self._read.tasks[index]
        self._parts.append(piece.data)
        self._arriving = piece.range
        received_bytes = sum(map(len, self._parts))
        if received_bytes < task.size_bytes:
            return
        if received_bytes > task.size_bytes:
            raise TransferError(
                "protocol", f"more than {task.size_bytes} bytes were sent for a range of frames"
            )
        parts, self._parts, self._arriving = self._parts, [], None
        self._metrics.received(received_bytes)
        if index not in self._placed:
            if not self._read.begin(index):
                return
            parts = [self._gathered(index, parts)]
        try:
            task.variant.header.verify_frames(task.first_frame, task.frame_count, parts[0])
        except ChunkFormatError as error:
            reason = MissReason.BAD_SIGNATURE if isinstance(error, SignatureError) else MissReason.CHECKSUM
            if reason is MissReason.BAD_SIGNATURE:
                self._signatures.refuse(task.variant.header, task.variant.header_data)
            self._failed[index] = reason
            what = (
                f"frames from the storage node at {self._member.endpoint} cannot be used ({reason}): {error}"
            )
            self._metrics.failures.warn(reason, what)
        else:
            self._read.deliver(index, parts[0])

    def _gathered(self, index: int, parts: Sequence[memoryview]) -> memoryview:
        """The bytes of a range that was not received in its place."""
        if self._buffers is None:
            return parts[0] if len(parts) == 1 else memoryview(b"".join(parts))
        buffer, end = self._buffers[index], 0
        for part in parts:
            buffer[end : end + len(part)] = part
            end += len(part)
        return buffer[:end]

    def _reason(self, error: TransferError) -> MissReason:
        if self._is_closed:
            return MissReason.CLOSED
        return MissReason.SILENT if self._is_silent else MissReason.of_fetch(error.reason)
