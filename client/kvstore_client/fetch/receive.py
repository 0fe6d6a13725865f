"""Receive stage: frame ranges from one owner, or from another in its place, as they come off the wire."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvstore_api.placement import Member
from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_client.cluster_view import ClusterView
from kvstore_client.fetch.base import ReadTask, ReceivedFrames
from kvstore_client.fetch.deliver import Delivery
from kvstore_client.fetch.failover import Failover, Reading
from kvstore_client.fetch.plan import RANGE_BYTES
from kvstore_client.fetch.queue import StageQueue
from kvstore_client.metrics import ClientMetrics
from kvstore_codec.errors import TransferError


@dataclass(frozen=True, slots=True)
class _Errand:
    """What is to be read from a member, perhaps because another one fell silent."""

    member: Member
    tasks: Sequence[ReadTask]
    hurried: bool
    instead_of: Member | None = None


@dataclass(frozen=True, slots=True)
class Receiver:
    """Receives for one fetch, in a thread per owner."""

    view: ClusterView
    failover: Failover
    delivery: Delivery
    out: StageQueue[ReceivedFrames]
    metrics: ClientMetrics

    def receive(self, owner: Member, owed: Sequence[ReadTask]) -> None:
        """Read the tasks that one owner owes in one stream and pass each on when it is complete.

        What the owner no longer has, or still owes when its stream breaks or falls silent, is read from others that
        have the same bytes; where nobody has, the chunk is missing. Returns early when the fetch is over.
        """
        waiting = deque([_Errand(owner, owed, hurried=self.failover.has_others(owed))])
        try:
            while waiting:
                errand = waiting.popleft()
                member = errand.member
                failed = self._read(member, errand.tasks, self._pass_on, hurried=errand.hurried)
                if errand.instead_of is not None and not failed:
                    self.failover.broke(errand.instead_of, "silent")
                for reason, unread in failed.items():
                    if self.delivery.is_over or reason == "timeout":
                        self.delivery.fail_chunks(unread, reason)
                        continue
                    if reason not in ("gone", "silent"):
                        self.failover.broke(member, reason)
                    places, nowhere = self.failover.elsewhere(unread)
                    if places:
                        self.metrics.failed_over(reason)
                    silent = member if reason == "silent" else None
                    waiting += [
                        _Errand(other, tasks, hurried=self.failover.has_others(tasks), instead_of=silent)
                        for other, tasks in places.items()
                    ]
                    if nowhere and reason == "silent":
                        waiting.append(_Errand(member, nowhere, hurried=False))  # it may only be slow
                    else:
                        self.delivery.fail_chunks(nowhere, reason)
        finally:
            self.out.close()

    def read_again(self, damaged: ReadTask) -> ReceivedFrames | None:
        """The same frames from another member; None when there is nobody left who has them."""
        received: list[ReceivedFrames] = []

        def keep(item: ReceivedFrames) -> bool:
            received.append(item)
            return True

        while not self.delivery.is_over and not received:
            places, _ = self.failover.elsewhere([damaged])
            if not places:
                return None
            for member, tasks in places.items():
                self._read(member, tasks, keep, hurried=False)
        return received[0] if received else None

    def _pass_on(self, item: ReceivedFrames) -> bool:
        return self.out.put(item, len(item.data))

    def _read(
        self,
        member: Member,
        tasks: Sequence[ReadTask],
        take: Callable[[ReceivedFrames], bool],
        *,
        hurried: bool,
    ) -> dict[str, list[ReadTask]]:
        """One stream, until `take` is False; what it did not bring, by reason. With `hurried` it is ended when it falls
        silent."""
        timeline = self.delivery.timeline
        stream = self.view.transport(member).read(_request(tasks), self.delivery.remaining_s())
        self.delivery.on_end(stream.cancel)
        reading = Reading(stream, hurried=hurried)
        unread: dict[str, list[ReadTask]] = {}
        done = 0
        try:
            parts: list[memoryview] = []
            received = 0
            start_s = timeline.now_s()
            for piece in self.failover.watched(reading):
                if (
                    done == len(tasks)
                    or piece.range != done
                    or (len(piece.data) == 0 and piece.status == pb.READ_STATUS_OK)
                ):
                    break
                task = tasks[done]
                self.delivery.progress(len(piece.data))
                if piece.status != pb.READ_STATUS_OK:
                    unread.setdefault("gone", []).append(task)
                else:
                    parts.append(piece.data)
                    received += len(piece.data)
                    if received < task.size_bytes:
                        continue
                    if received > task.size_bytes:
                        break
                    data = parts[0] if len(parts) == 1 else memoryview(b"".join(parts))
                    timeline.add("receive", start_s, timeline.now_s(), task.label)
                    if not take(ReceivedFrames(task, data)):
                        return {"cancelled": list(tasks[done:])}
                parts, received = [], 0
                done += 1
                start_s = timeline.now_s()
            reason = "protocol"
        except TransferError as error:
            reason = "silent" if reading.silent else error.reason
        finally:
            stream.cancel()
        if done < len(tasks):
            unread[reason] = list(tasks[done:])
        return unread


def _request(tasks: Sequence[ReadTask]) -> pb.ReadRequest:
    request = pb.ReadRequest(piece_bytes=RANGE_BYTES)
    positions: dict[int, int] = {}
    for task in tasks:
        if task.chunk_index not in positions:
            positions[task.chunk_index] = len(positions)
            chunk_id = task.chunk.chunk_id
            request.chunks.add(content_id=chunk_id.content_id, prefix_id=chunk_id.prefix_id)
            request.encodings.append(task.chunk.header.encoding.name)
        request.ranges.add(
            chunk=positions[task.chunk_index], first_frame=task.first_frame, frame_count=task.frame_count
        )
    return request
