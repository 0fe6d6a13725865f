"""Receive stage: receives frame ranges from an owner, or from another member in its place."""

import math
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from kvstore_api.placement import Member
from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_client.cluster_view import ClusterView
from kvstore_client.fetch.base import ReadTask, ReceivedFrames, read_request
from kvstore_client.fetch.cut import RANGE_BYTES
from kvstore_client.fetch.failover import AHEAD_S, Failover, WatchedStream
from kvstore_client.fetch.fetch_state import FetchState
from kvstore_client.fetch.queue import StageQueue
from kvstore_client.metrics import ClientMetrics
from kvstore_client.miss_reason import MissReason
from kvstore_client.planning import DEFAULT_BANDWIDTH_Bps
from kvstore_client.request_trace import read_traceparent
from kvstore_codec.errors import NodeUnavailableError, TransferError

# Sizes requested at once where the plan may change: the least that is worth a request, and the size on an unknown link.
_LEAST_BYTES, _UNKNOWN_BYTES = 128 << 10, 256 << 10
_PIECE_S, _LEAST_PIECE_BYTES = 0.05, 32 << 10


@dataclass(frozen=True, slots=True)
class _ReadAttempt:
    """Reads to request from one member, possibly because another one fell silent."""

    member: Member
    tasks: Sequence[ReadTask]
    hurried: bool
    instead_of: Member | None = None


@dataclass(frozen=True, slots=True)
class Receiver:
    """Receives the frames of one fetch, in one thread per owner."""

    view: ClusterView
    failover: Failover
    fetch_state: FetchState
    out: StageQueue[ReceivedFrames]
    metrics: ClientMetrics
    ahead: bool
    """Whether the plan may change, so that only what the link delivers soon is requested."""

    def receive(self, owner: Member) -> None:
        """Request the planned reads from one owner while there are any, and pass the received frames on.

        Reads that the owner no longer has, or that are outstanding when its stream breaks or falls silent, are
        requested from other members with the same bytes; without one the chunk is missing. Returns early when the fetch
        is over.
        """
        try:
            while tasks := self.fetch_state.next_reads(owner, self._ahead_bytes(owner)):
                self._bring(owner, tasks)
        finally:
            self.out.close()

    def _bring(self, owner: Member, owed: Sequence[ReadTask]) -> None:
        waiting = deque([_ReadAttempt(owner, owed, hurried=self.failover.has_others(owed))])
        while waiting:
            attempt = waiting.popleft()
            member = attempt.member
            failed = self._read(
                member,
                attempt.tasks,
                self._pass_on,
                hurried=attempt.hurried,
                may_stop=self.ahead and member == owner,
            )
            if attempt.instead_of is not None and not failed:
                self.failover.pause(attempt.instead_of, MissReason.SILENT)
            for reason, unread in failed.items():
                if self.fetch_state.is_over or reason in (MissReason.TIMEOUT, MissReason.CLOSED):
                    self.fetch_state.fail_chunks(unread, reason)
                    continue
                if reason not in (MissReason.GONE, MissReason.SILENT):
                    self.failover.pause(member, reason)
                places, nowhere = self.failover.find_others(unread)
                if places:
                    self.metrics.failed_over(reason)
                silent = member if reason is MissReason.SILENT else None
                waiting += [
                    _ReadAttempt(other, tasks, hurried=self.failover.has_others(tasks), instead_of=silent)
                    for other, tasks in places.items()
                ]
                if nowhere and reason is MissReason.SILENT:
                    waiting.append(_ReadAttempt(member, nowhere, hurried=False))  # it may only be slow
                else:
                    self.fetch_state.fail_chunks(nowhere, reason)

    def _ahead_bytes(self, owner: Member) -> float:
        """Bytes to request at once."""
        if not self.ahead:
            return math.inf
        bandwidth_Bps = self.failover.links.bandwidth_Bps(owner.endpoint)  # noqa: N806
        return _UNKNOWN_BYTES if bandwidth_Bps is None else max(_LEAST_BYTES, AHEAD_S * bandwidth_Bps)

    def read_again(self, damaged: ReadTask) -> ReceivedFrames | None:
        """Read the same frames from another member; None when no other member has them."""
        received: list[ReceivedFrames] = []

        def keep(item: ReceivedFrames) -> bool:
            received.append(item)
            return True

        while not self.fetch_state.is_over and not received:
            places, _ = self.failover.find_others([damaged])
            if not places:
                return None
            for member, tasks in places.items():
                self._read(member, tasks, keep, hurried=False)
        return received[0] if received else None

    def _piece_bytes(self, member: Member) -> int:
        """Maximum piece size, bytes. gRPC shows a piece only when it is complete, so a slow link gets small pieces."""
        bandwidth_Bps = self.failover.links.bandwidth_Bps(member.endpoint) or DEFAULT_BANDWIDTH_Bps  # noqa: N806
        return int(min(max(_PIECE_S * bandwidth_Bps, _LEAST_PIECE_BYTES), RANGE_BYTES))

    def _pass_on(self, item: ReceivedFrames) -> bool:
        return self.out.put(item, len(item.data))

    def _read(
        self,
        member: Member,
        tasks: Sequence[ReadTask],
        take: Callable[[ReceivedFrames], bool],
        *,
        hurried: bool,
        may_stop: bool = False,
    ) -> dict[MissReason, list[ReadTask]]:
        """Read one stream until `take` returns False. Returns the tasks that did not arrive, by reason. A `hurried`
        stream is ended when it falls silent; with `may_stop` a stream that has become slow is ended between two reads,
        and its other reads are replanned."""
        timeline = self.fetch_state.timeline
        request = read_request(tasks, self._piece_bytes(member), self.view.tenant)
        request.traceparent = read_traceparent(timeline)
        try:
            stream = self.view.transport(member).read(request, self.fetch_state.remaining_s())
        except NodeUnavailableError:
            return {MissReason.CLOSED: list(tasks)}
        reading = WatchedStream(
            stream,
            self.failover.links,
            member.endpoint,
            [task.size_bytes for task in tasks],
            request=timeline,
            is_waited_for=lambda: self.fetch_state.is_engine_waiting,
            hurried=hurried,
        )
        unread: dict[MissReason, list[ReadTask]] = {}
        done = 0
        reason: MissReason | None = MissReason.PROTOCOL
        watching = ExitStack()
        watching.enter_context(self.fetch_state.until_end(stream.cancel))
        try:
            parts: list[memoryview] = []
            received = 0
            start_s = timeline.now_s()
            for piece in watching.enter_context(self.failover.watched(member, reading)):
                if (
                    done == len(tasks)
                    or piece.range != done
                    or (len(piece.data) == 0 and piece.status == pb.READ_STATUS_OK)
                ):
                    break
                task = tasks[done]
                self.fetch_state.count_received(len(piece.data))
                if piece.status != pb.READ_STATUS_OK:
                    unread.setdefault(MissReason.GONE, []).append(task)
                else:
                    parts.append(piece.data)
                    received += len(piece.data)
                    if received < task.size_bytes:
                        continue
                    if received > task.size_bytes:
                        break
                    data = parts[0] if len(parts) == 1 else memoryview(b"".join(parts))
                    timeline.add(
                        "receive",
                        start_s,
                        timeline.now_s(),
                        task.label,
                        chunk=task.chunk_index,
                        encoding=task.encoding.name,
                    )
                    if not take(ReceivedFrames(task, data)):
                        return {MissReason.CANCELLED: list(tasks[done:])}
                parts, received = [], 0
                done += 1
                start_s = timeline.now_s()
                if may_stop and reading.is_slow and done < len(tasks):
                    reason = None
                    break
        except TransferError as error:
            reason = MissReason.SILENT if reading.is_silent else MissReason.of_fetch(error.reason)
            if not self.fetch_state.is_over:
                self.metrics.failures.warn(
                    reason, f"a read from {member.endpoint} broke off ({reason}): {error}"
                )
        finally:
            watching.close()
            stream.cancel()
        if reason is None:
            self.fetch_state.requeue(tasks[done:])
        elif done < len(tasks):
            unread[reason] = list(tasks[done:])
        return unread
