"""Reads frames from the nodes that hold them, and from other members when those fail."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Sequence

from kvstore_api.placement import Member
from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_client.cluster_view import ClusterView
from kvstore_client.fetch.base import ReadTask
from kvstore_client.frames.node_read import NodeRead
from kvstore_client.frames.read import FrameRead
from kvstore_client.metrics import ClientMetrics
from kvstore_client.miss_reason import MissReason
from kvstore_client.planning import Links
from kvstore_client.replicas import Search
from kvstore_client.request_id import in_request
from kvstore_client.settings import ClientSettings
from kvstore_client.transport import ReceiveMemory
from kvstore_client.watch import Watch
from kvstore_codec.chunk import ChunkHeader, read_header
from kvstore_codec.errors import CodecError, NodeUnavailableError
from kvstore_codec.identity import ChunkId

log = logging.getLogger(__name__)

_FINAL = frozenset({MissReason.TIMEOUT, MissReason.CANCELLED, MissReason.CLOSED, MissReason.NO_RESOURCES})
"""Reasons that another node does not help against."""
_UNUSABLE = frozenset({MissReason.GONE, MissReason.CHECKSUM, MissReason.BAD_SIGNATURE})
_HARMLESS = _UNUSABLE | {MissReason.SILENT} | _FINAL
"""Reasons for which the node is not skipped afterwards."""
_CLOSE_S = 5.0


class FrameReader:
    """Starts reads of frames. Thread-safe."""

    def __init__(
        self, view: ClusterView, settings: ClientSettings, metrics: ClientMetrics, links: Links
    ) -> None:
        self._view, self._settings, self._metrics, self._links = view, settings, metrics, links
        self._memory = ReceiveMemory()
        self._watch = Watch("kvstore-frame-watch")

    def start(
        self,
        tasks: Sequence[ReadTask],
        timeout_s: float,
        buffers: Sequence[memoryview] | None,
        traceparent: str = "",
    ) -> FrameRead:
        """Begin to receive these ranges, in one thread per node."""
        read = FrameRead(tasks, timeout_s, traceparent)
        by_member: dict[Member, list[int]] = {}
        for index, task in enumerate(tasks):
            by_member.setdefault(task.chunk.member, []).append(index)
        for member, indices in by_member.items():
            arguments = (read, buffers, member, indices)
            try:
                threading.Thread(
                    target=in_request(self._bring), args=arguments, name="kvstore-frames", daemon=True
                ).start()
            except RuntimeError:  # this process has no thread left
                read.fail(indices, MissReason.NO_RESOURCES)
        return read

    def close(self) -> None:
        """End all reads; what has not arrived is missing."""
        self._watch.stop(_CLOSE_S)

    def _bring(
        self, read: FrameRead, buffers: Sequence[memoryview] | None, holder: Member, indices: Sequence[int]
    ) -> None:
        """Read ranges from their holder, and failed ones from other members."""
        try:
            tried = {index: [holder] for index in indices}
            waiting = deque([(holder, indices, self._has_others(read, tried))])
            while waiting:
                member, wanted, hurried = waiting.popleft()
                failed = self._read_from(member, read, wanted, buffers, hurried=hurried)
                again = [index for index, reason in failed.items() if reason not in _FINAL]
                places = self._others(read, again, tried)
                for other, found in places.items():
                    for index in found:
                        tried[index].append(other)
                        self._metrics.failed_over(failed.pop(index))
                    waiting.append((other, found, False))
                if hurried:  # it may only be slow, and nobody else has these
                    slow = [index for index, reason in failed.items() if reason is MissReason.SILENT]
                    if slow:
                        waiting.append((member, slow, False))
                    failed = {
                        index: reason for index, reason in failed.items() if reason is not MissReason.SILENT
                    }
                for index, reason in failed.items():
                    read.fail([index], reason)
        except Exception:
            log.exception("a read of frames failed")
        finally:
            read.fail(indices, MissReason.INTERNAL_ERROR)

    def _read_from(
        self,
        member: Member,
        read: FrameRead,
        indices: Sequence[int],
        buffers: Sequence[memoryview] | None,
        *,
        hurried: bool,
    ) -> dict[int, MissReason]:
        """Read ranges from one member. Returns those that did not come, with the reason."""
        timeouts = self._settings.timeouts
        node_read = NodeRead(
            read,
            member,
            indices,
            buffers=buffers,
            memory=self._memory,
            metrics=self._metrics,
            links=self._links,
            signatures=self._view.signatures,
            patience_s=timeouts.failover_s if hurried else timeouts.fetch_stall_s,
        )
        failed = node_read.run(self._view, self._watch)
        for reason in set(failed.values()) - _UNUSABLE - _FINAL:
            self._metrics.failures.warn(reason, node_read.why)
            if reason not in _HARMLESS or not hurried:
                self._view.pause(
                    member.endpoint, node_read.why, until_it_answers=reason is MissReason.UNREACHABLE
                )
                self._view.refresh()
        return {
            index: MissReason.STALLED if reason is MissReason.SILENT and not hurried else reason
            for index, reason in failed.items()
        }

    def _has_others(self, read: FrameRead, tried: dict[int, list[Member]]) -> bool:
        """Whether another member should have any of these chunks."""
        contents = list({read.tasks[index].chunk.chunk_id.content_id for index in tried})
        try:
            if self._view.membership().replicas == 1:
                return False
            return any(len(members) > 1 for members in self._view.readers(contents))
        except NodeUnavailableError:
            return False

    def _others(
        self, read: FrameRead, indices: Sequence[int], tried: dict[int, list[Member]]
    ) -> dict[Member, list[int]]:
        """Members that have the same chunks as the failed ranges, apart from those that were tried."""
        if not indices or not self._has_others(read, {index: tried[index] for index in indices}):
            return {}
        wanted: dict[ChunkId, set[ChunkHeader]] = {}
        for index in indices:
            task = read.tasks[index]
            wanted.setdefault(task.chunk.chunk_id, set()).add(task.variant.header)
        ids = list(wanted)
        places: dict[ChunkId, Member] = {}

        def take(position: int, member: Member, answer: pb.LookupAnswer) -> bool:
            try:
                headers = [read_header(data) for data in (answer.header, *(o.header for o in answer.others))]
            except CodecError:
                return False
            if not wanted[ids[position]].issubset(headers):
                return False
            places[ids[position]] = member
            return True

        encodings = sorted({read.tasks[index].encoding.name for index in indices})
        tried_of: dict[ChunkId, list[Member]] = {}
        for index in indices:
            tried_of.setdefault(read.tasks[index].chunk.chunk_id, []).extend(tried[index])
        search = Search(
            self._view, self._settings, ids, encodings, take, all_encodings=len(encodings) > 1, peek=True
        )
        try:
            search.run(range(len(ids)), {p: tried_of[i] for p, i in enumerate(ids)}, read.left_s)
        except NodeUnavailableError:
            return {}
        found: dict[Member, list[int]] = {}
        for index in indices:
            member = places.get(read.tasks[index].chunk.chunk_id)
            if member is not None:
                found.setdefault(member, []).append(index)
        return found
