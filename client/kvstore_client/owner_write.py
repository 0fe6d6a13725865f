"""Sends chunks to one of their owners."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from kvstore_api.chunk_refs import chunk_ref
from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_client.settings import ClientSettings, Durability
from kvstore_client.transport import Transport
from kvstore_codec.chunk import ChunkHeader
from kvstore_codec.codec import EncodedChunk
from kvstore_codec.errors import TransferError
from kvstore_codec.identity import ChunkId, ContentId, PrefixId

_PIECE_BYTES = 1 << 20
_AHEAD_BYTES = 16 << 20
"""Bytes that may be queued for a slow owner while the others receive theirs."""


_DURABILITIES = {
    Durability.DEFAULT: pb.DURABILITY_DEFAULT,
    Durability.MEMORY: pb.DURABILITY_MEMORY,
    Durability.RELAXED: pb.DURABILITY_RELAXED,
    Durability.DURABLE: pb.DURABILITY_DURABLE,
}


def keep_as(settings: ClientSettings, cost: float, refused: Sequence[bytes] = ()) -> pb.PutStart:
    """How nodes keep a client's new chunks; `cost` is that of computing one again. A stored chunk is replaced if the
    digest of its header is in `refused`."""
    return pb.PutStart(
        ttl_s=settings.store.ttl_s,
        tenant=settings.store.tenant,
        durability=_DURABILITIES[settings.store.durability],
        cost=cost,
        refused=refused,
    )


@dataclass(frozen=True, slots=True)
class OutgoingChunk:
    """A chunk to send: `parts` are its bytes, `start.size_bytes` in total, and `start` says how nodes keep it."""

    start: pb.PutStart
    parts: tuple[memoryview, ...]

    @classmethod
    def of(cls, encoded: EncodedChunk, keep: pb.PutStart) -> "OutgoingChunk":
        """The chunk with the lifetime, tenant, durability and cost of `keep`; the other fields describe the chunk."""
        return cls.with_header(encoded.header, tuple(memoryview(part) for part in encoded.parts), keep)

    @classmethod
    def with_header(
        cls, header: ChunkHeader, parts: tuple[memoryview, ...], keep: pb.PutStart
    ) -> "OutgoingChunk":
        """Like `of`, for a chunk whose `header` describes the bytes in `parts`."""
        start = pb.PutStart(
            chunk=chunk_ref(header.chunk_id),
            encoding=header.encoding.name,
            size_bytes=header.size_bytes,
            calibration=header.calibration or b"",
        )
        start.MergeFrom(keep)
        return cls(start, parts)

    @property
    def chunk_id(self) -> ChunkId:
        ref = self.start.chunk
        return ChunkId(ContentId(ref.content_id), PrefixId(ref.prefix_id))

    def standing(self, number: int, behind: ChunkId | None) -> "OutgoingChunk":
        """The chunk for one node, with its number in the text and the previous chunk of the text on that node."""
        start = pb.PutStart(number=number)
        if behind is not None:
            start.behind.append(chunk_ref(behind))
        start.MergeFrom(self.start)
        return replace(self, start=start)

    def steps(self) -> Iterator[pb.PutRequest | memoryview]:
        """Steps of the chunk in a Put stream; a memoryview is a piece of its bytes."""
        yield pb.PutRequest(start=self.start)
        for view in self.parts:
            for begin in range(0, len(view), _PIECE_BYTES):
                yield view[begin : begin + _PIECE_BYTES]
        yield pb.PutRequest(end=pb.PutEnd())


class OwnerWrite:
    """One Put stream, fed chunk by chunk, and a thread that waits for the owner's answers.

    An owner that neither receives nor answers anything for `stall_s` is abandoned: it delays the others no longer than
    that. One thread calls `put`, `complete` and `finish`; any thread may call `cancel`.
    """

    def __init__(self, transport: Transport, *, timeout_s: float, stall_s: float) -> None:
        self.answers: list[pb.PutReply] = []
        """The owner's answers, one per chunk in the order of the puts; fewer when it failed."""
        self.failure: str | None = None
        self.detail = ""
        """The transport's description of a failure."""
        self._stall_s = stall_s
        self._changed = threading.Condition()
        self._waiting: deque[OutgoingChunk] = deque()
        self._waiting_bytes = 0
        self._complete = self._cancelled = self._over = False
        self._moved_at_s = time.monotonic()
        self._stream = transport.put(self._steps(), timeout_s)
        self._thread = threading.Thread(target=self._run, name="kvstore-put", daemon=True)
        self._thread.start()

    def put(self, chunk: OutgoingChunk) -> None:
        """Queue a chunk, waiting while too many bytes are queued. Does nothing when the owner has failed."""
        size_bytes = chunk.start.size_bytes
        self._await(
            lambda: not self._waiting or self._waiting_bytes + size_bytes <= _AHEAD_BYTES, time.monotonic()
        )
        with self._changed:
            if self._over or self._cancelled:
                return
            self._waiting.append(chunk)
            self._waiting_bytes += size_bytes
            self._changed.notify_all()

    def complete(self) -> None:
        """Announce that no chunk follows."""
        with self._changed:
            self._complete = True
            self._moved_at_s = time.monotonic()
            self._changed.notify_all()

    def finish(self) -> None:
        """Wait for the last answer, after `complete`."""
        self._await(lambda: False, began_s=self._moved_at_s)
        self._thread.join()

    def cancel(self, reason: str) -> None:
        """End the stream now. Acknowledged chunks stay stored."""
        with self._changed:
            self.failure = self.failure or reason
            self._cancelled = True
            self._waiting.clear()
            self._changed.notify_all()
        self._stream.cancel()

    def _await(self, condition: Callable[[], bool], began_s: float) -> None:
        """Wait until the condition holds or the stream is over, also because the owner has stalled for `stall_s`."""
        while True:
            with self._changed:
                if self._over or condition():
                    return
                left_s = max(began_s, self._moved_at_s) + self._stall_s - time.monotonic()
                if left_s > 0:
                    self._changed.wait(left_s)
                    continue
            self.cancel("stalled")
            began_s = time.monotonic()

    def _steps(self) -> Iterator[pb.PutRequest | memoryview]:
        """Steps of the stream. The transport iterates in a thread of its choice."""
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._waiting or self._complete or self._cancelled or self._over
                )
                if self._cancelled or self._over or not self._waiting:
                    return
                chunk = self._waiting.popleft()
                self._waiting_bytes -= chunk.start.size_bytes
                self._changed.notify_all()
            for step in chunk.steps():
                self._moved_at_s = time.monotonic()
                yield step

    def _run(self) -> None:
        failure: str | None = None
        try:
            for answer in self._stream:
                self.answers.append(answer)
                self._moved_at_s = time.monotonic()
        except TransferError as error:
            failure, self.detail = error.reason, str(error)
        finally:
            self._stream.cancel()
            with self._changed:
                self.failure = self.failure or failure
                self._over = True
                self._waiting.clear()
                self._changed.notify_all()
