"""Receives the ranges of a FrameRead from the nodes that hold them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence

from kvstore_api.placement import Member
from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_client.cluster_view import ClusterView
from kvstore_client.fetch.base import ReadTask, read_request
from kvstore_client.frames.read import FrameRead
from kvstore_client.metrics import ClientMetrics
from kvstore_client.miss_reason import MissReason
from kvstore_codec.errors import ChunkFormatError, NodeUnavailableError, TransferError

log = logging.getLogger(__name__)


def start_read(
    view: ClusterView,
    metrics: ClientMetrics,
    tasks: Sequence[ReadTask],
    timeout_s: float,
    buffers: Sequence[memoryview] | None,
) -> FrameRead:
    """Begin to receive these ranges, in one thread per node."""
    read = FrameRead(tasks, timeout_s)
    by_member: dict[Member, list[int]] = {}
    for index, task in enumerate(tasks):
        by_member.setdefault(task.chunk.member, []).append(index)
    for member, indices in by_member.items():
        receiver = _Receiver(view, metrics, read, buffers, member, indices)
        try:
            threading.Thread(target=receiver.run, name="kvstore-frames", daemon=True).start()
        except RuntimeError:  # this process has no thread left
            read.fail(indices, MissReason.NO_RESOURCES)
    return read


class _Receiver:
    """Receives the ranges of one read from one node."""

    def __init__(
        self,
        view: ClusterView,
        metrics: ClientMetrics,
        read: FrameRead,
        buffers: Sequence[memoryview] | None,
        member: Member,
        indices: Sequence[int],
    ) -> None:
        self._view, self._metrics, self._read, self._buffers = view, metrics, read, buffers
        self._member, self._indices = member, indices

    def run(self) -> None:
        reason = MissReason.INTERNAL_ERROR
        try:
            reason = self._receive()
        except NodeUnavailableError:
            reason = MissReason.CLOSED
        except TransferError as error:
            reason = MissReason.of_fetch(error.reason)
            self._warn(reason, f"a read of frames from {self._member.endpoint} broke off: {error}")
        except Exception:
            log.exception("a read of frames failed")
        finally:
            self._read.fail(self._indices, reason)

    def _receive(self) -> MissReason:
        """Receive all ranges. Returns why those that are left did not come. Raises TransferError,
        NodeUnavailableError."""
        read, indices = self._read, self._indices
        stream = self._view.transport(self._member).read(self._request(), read.left_s)
        parts: list[memoryview] = []
        received = done = 0
        try:
            for piece in stream:
                if done == len(indices) or piece.range != done:
                    return MissReason.PROTOCOL
                index = indices[done]
                if piece.status != pb.READ_STATUS_OK:
                    read.fail([index], MissReason.GONE)
                else:
                    parts.append(piece.data)
                    received += len(piece.data)
                    if received < read.tasks[index].size_bytes:
                        continue
                    self._take(index, parts)
                parts, received, done = [], 0, done + 1
                if not any(map(read.is_wanted, indices[done:])):
                    return MissReason.CANCELLED
        finally:
            stream.cancel()
        return MissReason.PROTOCOL

    def _take(self, index: int, parts: Sequence[memoryview]) -> None:
        """Verify the frames of a range and deliver them."""
        read = self._read
        if not read.begin(index):
            return
        data = parts[0] if len(parts) == 1 else memoryview(b"".join(parts))
        task = read.tasks[index]
        self._metrics.received(len(data))
        try:
            task.variant.header.verify_frames(task.first_frame, task.frame_count, data)
        except ChunkFormatError as error:
            self._warn(
                MissReason.CHECKSUM, f"frames from {self._member.endpoint} cannot be used (checksum): {error}"
            )
            read.fail([index], MissReason.CHECKSUM)
            return
        if self._buffers is not None:
            buffer = self._buffers[index][: len(data)]
            buffer[:] = data
            data = buffer
        read.deliver(index, data)

    def _request(self) -> pb.ReadRequest:
        return read_request([self._read.tasks[index] for index in self._indices])

    def _warn(self, reason: MissReason, what: str) -> None:
        if not self._read.is_complete:
            self._metrics.failures.warn(reason, what)
