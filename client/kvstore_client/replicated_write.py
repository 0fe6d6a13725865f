"""Chunks on their way to all of their owners at once."""

import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from kvstore_api.placement import Member
from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_client.cluster_view import ClusterView
from kvstore_client.owner_write import OutgoingChunk, OwnerWrite
from kvstore_client.settings import ClientSettings

_STORED = (pb.PUT_STATUS_STORED, pb.PUT_STATUS_ALREADY_STORED)
_REASONS = {value: name.removeprefix("PUT_STATUS_").lower() for name, value in pb.PutStatus.items()}


@dataclass(slots=True)
class Written:
    """What became of one chunk."""

    copies: int = 0
    """Nodes that acknowledged it."""
    refusals: list[str] = field(default_factory=list)
    """Why other nodes did not take it: `full`, `over_quota`, `invalid`, ..."""


class ReplicatedWrite:
    """One batch of chunks. Each owner has a stream of its own, so a dead one costs the others nothing but, at the end,
    `put_stall_timeout_s`. `put` and `finish` are for one thread, `cancel` for any."""

    def __init__(self, view: ClusterView, settings: ClientSettings) -> None:
        self.failures: Counter[str] = Counter()
        """Why streams broke, once `finish` has returned; their nodes are paused."""
        self.details: dict[str, str] = {}
        """A sentence for each of these reasons."""
        self._view, self._settings = view, settings
        self._written: list[Written] = []
        self._lock = threading.Lock()
        self._writes: dict[Member, tuple[OwnerWrite, list[Written]]] = {}
        self._cancelled = False

    def put(self, chunk: OutgoingChunk, owners: Sequence[Member]) -> None:
        """Send a chunk to these owners, waiting while too much waits for one of them already."""
        written = Written()
        self._written.append(written)
        for owner in owners:
            begun = self._begun(owner)
            if begun is not None:
                write, chunks = begun
                chunks.append(written)
                write.put(chunk)

    def finish(self) -> list[Written]:
        """Wait until every owner has answered or failed. What became of each chunk, in order."""
        for write, _ in self._writes.values():
            write.complete()
        for owner, (write, chunks) in self._writes.items():
            write.finish()
            for written, answer in zip(chunks, write.answers, strict=False):
                if answer.status in _STORED:
                    written.copies += 1
                else:
                    written.refusals.append(_REASONS.get(answer.status, "protocol"))
            failure = write.failure
            if failure is None and len(write.answers) != len(chunks):
                failure = "protocol"
            if failure is not None:
                self.failures[failure] += 1
                why = f"the storage node at {owner.endpoint} did not take chunks: {write.detail or failure}"
                self.details[failure] = why
                self._view.pause(owner.endpoint, why, until_it_answers=failure == "unreachable")
                self._view.refresh()
            else:
                self._view.recovered(owner.endpoint)
        return self._written

    def cancel(self) -> None:
        """End it now. What was acknowledged stays stored."""
        with self._lock:
            self._cancelled = True
            writes = list(self._writes.values())
        for write, _ in writes:
            write.cancel("cancelled")

    def _begun(self, owner: Member) -> tuple[OwnerWrite, list[Written]] | None:
        with self._lock:
            if self._cancelled:
                return None
            if owner not in self._writes:
                write = OwnerWrite(
                    self._view.transport(owner),
                    timeout_s=self._settings.put_timeout_s,
                    stall_s=self._settings.put_stall_timeout_s,
                )
                self._writes[owner] = write, []
            return self._writes[owner]
