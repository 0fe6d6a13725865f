"""Sends chunks to all of their owners at once."""

import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from kvstore_api.placement import Member
from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_client.cluster_view import ClusterView
from kvstore_client.miss_reason import MissReason
from kvstore_client.owner_write import OutgoingChunk, OwnerWrite
from kvstore_client.settings import ClientSettings
from kvstore_client.texts import TextPlaces

_STORED = (pb.PUT_STATUS_STORED, pb.PUT_STATUS_ALREADY_STORED)
_REFUSALS: dict[int, MissReason] = {
    pb.PUT_STATUS_INVALID: MissReason.STORE_INVALID,
    pb.PUT_STATUS_TOO_LARGE: MissReason.STORE_TOO_LARGE,
    pb.PUT_STATUS_FULL: MissReason.STORE_FULL,
    pb.PUT_STATUS_OVER_QUOTA: MissReason.STORE_OVER_QUOTA,
    pb.PUT_STATUS_NOT_DURABLE: MissReason.STORE_NOT_DURABLE,
    pb.PUT_STATUS_REVOKED: MissReason.STORE_FORGOTTEN,
}


@dataclass(slots=True)
class WriteResult:
    """Result of writing one chunk in one encoding."""

    text: TextPlaces
    encoding: str
    owners: int
    """Number of nodes that should store it."""
    copies: int = 0
    """Number of nodes that acknowledged it."""
    refusals: list[MissReason] = field(default_factory=list)
    """Reasons of the nodes that did not accept it."""


@dataclass(slots=True)
class _Stream:
    """An owner's stream, and the chunks that were sent through it."""

    write: OwnerWrite
    chunks: list[WriteResult] = field(default_factory=list)
    counted: int = 0
    """Number of answers counted so far."""


class ReplicatedWrite:
    """One batch of chunks. Each owner has its own stream, so a dead owner costs the others only `put_stall_timeout_s`
    at the end. One thread calls `put`, `is_cut` and `finish`; any thread may call `cancel`."""

    def __init__(
        self, view: ClusterView, settings: ClientSettings, *, timeout_s: float | None = None
    ) -> None:
        """The batch must be stored within `timeout_s` (default: `put_timeout_s`)."""
        self.failures: Counter[MissReason] = Counter()
        """Why streams failed, once `finish` has returned. Their nodes are paused, unless the write was cancelled or had
        less time than `put_timeout_s`."""
        self.details: dict[MissReason, str] = {}
        """A sentence for each of these reasons."""
        self._view, self._settings = view, settings
        self._timeout_s = settings.timeouts.put_s if timeout_s is None else timeout_s
        self._written: list[WriteResult] = []
        self._lock = threading.Lock()
        self._streams: dict[Member, _Stream] = {}
        self._cut: set[tuple[TextPlaces, str]] = set()
        self._cut_at: set[tuple[TextPlaces, str, Member]] = set()
        self._cancelled = False

    def put(self, chunk: OutgoingChunk, owners: Sequence[Member], text: TextPlaces) -> None:
        """Send a chunk of `text` to these owners, waiting while too many bytes are queued for one of them. An owner
        that has refused an earlier chunk because it keeps the text's beginning is left out."""
        chunk_id, encoding = chunk.chunk_id, chunk.start.encoding
        written = WriteResult(text, encoding, len(owners))
        self._written.append(written)
        for owner in owners:
            if (text, encoding, owner) in self._cut_at:
                self._refused(written, MissReason.STORE_TEXT_CUT)
                continue
            stream = self._begun(owner)
            if stream is not None:
                stream.chunks.append(written)
                stream.write.put(chunk.standing(text.number(chunk_id), text.behind(chunk_id, owner)))

    def is_cut(self, text: TextPlaces, encoding: str) -> bool:
        """Whether the text is cut: a chunk of it is known to be stored nowhere in this encoding, because the nodes keep
        the chunks before it. Later chunks are useless then."""
        for owner, stream in self._streams.items():
            self._count(owner, stream)
        return (text, encoding) in self._cut

    def finish(self) -> list[WriteResult]:
        """Wait until every owner has answered or failed. Returns the result of each chunk, in order."""
        for stream in self._streams.values():
            stream.write.complete()
        for owner, stream in self._streams.items():
            stream.write.finish()
            self._count(owner, stream)
            failure = stream.write.failure
            if failure is None and len(stream.write.answers) != len(stream.chunks):
                failure = "protocol"
            if failure is not None:
                reason = MissReason.of_store(failure)
                why = f"the storage node at {owner.endpoint} did not accept chunks: {stream.write.detail or failure}"
                self.failures[reason] += 1
                self.details[reason] = why
                if not self._is_own(failure):
                    self._view.pause(owner.endpoint, why, until_it_answers=failure == "unreachable")
                    self._view.refresh()
            else:
                self._view.recovered(owner.endpoint)
        return self._written

    def cancel(self) -> None:
        """End all streams now. Acknowledged chunks stay stored."""
        with self._lock:
            self._cancelled = True
            streams = list(self._streams.values())
        for stream in streams:
            stream.write.cancel("cancelled")

    def _is_own(self, failure: str) -> bool:
        """Whether the owner has not failed: the write was cancelled, or had less time than the settings give it."""
        hasty = self._timeout_s < self._settings.timeouts.put_s
        return failure == "cancelled" or (failure == "timeout" and hasty)

    def _count(self, owner: Member, stream: _Stream) -> None:
        """Count the answers that arrived since the last call."""
        answers = stream.write.answers
        for written, answer in zip(stream.chunks[stream.counted :], answers[stream.counted :], strict=False):
            stream.counted += 1
            if answer.status in _STORED:
                written.copies += 1
                continue
            if answer.text_cut:
                self._cut_at.add((written.text, written.encoding, owner))
            refusal = _REFUSALS.get(answer.status, MissReason.STORE_PROTOCOL)
            self._refused(written, MissReason.STORE_TEXT_CUT if answer.text_cut else refusal)

    def _refused(self, written: WriteResult, reason: MissReason) -> None:
        written.refusals.append(reason)
        if len(written.refusals) == written.owners and MissReason.STORE_TEXT_CUT in written.refusals:
            self._cut.add((written.text, written.encoding))

    def _begun(self, owner: Member) -> _Stream | None:
        with self._lock:
            if self._cancelled:
                return None
            if owner not in self._streams:
                write = OwnerWrite(
                    self._view.transport(owner),
                    timeout_s=self._timeout_s,
                    stall_s=self._settings.timeouts.put_stall_s,
                )
                self._streams[owner] = _Stream(write)
            return self._streams[owner]
