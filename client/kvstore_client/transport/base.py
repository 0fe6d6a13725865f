"""Interface of a transport for a storage node's KV bytes."""

from collections.abc import Collection, Iterator
from typing import Protocol

from kvstore_api.bulk import ReadPiece
from kvstore_api.v1 import kvstore_pb2 as pb


class ReadStream(Protocol):
    """The answer to one read, in the order of its ranges; a range arrives in one or several pieces.

    A piece's `data` stays valid as long as anything refers to it or to a slice of it; afterwards its memory may be used
    for another piece. Iterating raises only TransferError. A stream that is not iterated to its end must be cancelled.
    """

    @property
    def moved_at_s(self) -> float:
        """Monotonic time at which bytes last arrived, including those of an incomplete piece; -inf where a transport
        sees only whole pieces."""

    @property
    def incomplete_bytes(self) -> int:
        """Received bytes of the incomplete piece; 0 where a transport sees only whole pieces."""

    def __iter__(self) -> Iterator[ReadPiece]: ...

    def cancel(self) -> None:
        """End the stream now. Any thread may call it, also after the end."""


class PutStream(Protocol):
    """One reply per chunk of a put, in order. The `steps` are consumed, in any thread, while the replies are awaited.

    Iterating raises only TransferError: a failing `steps` iterator ends the put with the reason `cancelled`, and
    nothing of the unfinished chunk is stored. A stream that is not iterated to its end must be cancelled.
    """

    @property
    def moved_at_s(self) -> float:
        """Like that of a ReadStream."""

    @property
    def incomplete_bytes(self) -> int:
        """Like that of a ReadStream."""

    def __iter__(self) -> Iterator[pb.PutReply]: ...

    def cancel(self) -> None:
        """End the put now. Any thread may call it, also after the end. Acknowledged chunks stay stored."""


class Memory(Protocol):
    """Memory for received bytes, provided by the caller."""

    def take(self, size_bytes: int) -> memoryview:
        """Writable memory for the next bytes: `size_bytes` of it, or less, and then the rest is requested again."""


class Places(Protocol):
    """Memory for the ranges of a read in any order, provided by the caller. Used by the thread that iterates."""

    def place(self, index: int, size_bytes: int) -> memoryview:
        """Writable memory of exactly this size for a range that arrives now. Raises TransferError for a size that the
        range does not have."""

    def cancelled(self) -> Collection[int]:
        """Ranges that are no longer wanted, since the last call."""


class Transport(Protocol):
    """Data path of one storage node. Thread-safe: several streams may run at once."""

    def read(self, request: pb.ReadRequest, timeout_s: float, memory: Memory | None = None) -> ReadStream:
        """Start a read, which must be complete within `timeout_s`.

        With `memory`, a transport that receives in place writes the bytes there, range after range, and a piece's
        `data` is the view that `take` returned. Other transports use memory of their own.
        """

    def read_frames(self, request: pb.ReadRequest, timeout_s: float, places: Places) -> ReadStream:
        """Start a read whose ranges may come in any order (`any_order` is set here), which must be complete within
        `timeout_s`.

        A transport that receives in place writes each range to its place, and yields it in one piece. Other transports
        use memory of their own, and yield the pieces of a range one after the other. A transport that can tell the node
        about cancelled ranges does so between two ranges; they come with READ_STATUS_CANCELLED, or in full when they
        were already on the way. The stream ends early, with TransferError("cancelled"), when nothing that is left is
        wanted and the node cannot be told.
        """

    def put(self, steps: Iterator[pb.PutRequest | memoryview], timeout_s: float) -> PutStream:
        """Start storing chunks. Each chunk is start, data..., and end or revoke. A memoryview is data; its content must
        not change until its chunk is answered."""
