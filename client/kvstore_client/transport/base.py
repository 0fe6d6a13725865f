"""What every way to a storage node's KV bytes can do."""

from collections.abc import Iterator
from typing import Protocol

from kvstore_api.bulk import ReadPiece
from kvstore_api.v1 import kvstore_pb2 as pb


class ReadStream(Protocol):
    """The answer to one read, in the order of its ranges; a range comes in one piece or in several.

    A piece's `data` stays as it is for as long as anybody refers to it or to a slice of it; then its memory may be
    used again for another piece. Iterating raises TransferError, and only that. An answer that is not iterated to its
    end must be cancelled.
    """

    @property
    def moved_at_s(self) -> float:
        """When bytes last came, in monotonic time, also those of a piece that is not complete; -inf where a transport
        sees pieces only."""

    @property
    def incomplete_bytes(self) -> int:
        """What has come of the piece that is waited for; 0 where a transport sees pieces only."""

    def __iter__(self) -> Iterator[ReadPiece]: ...

    def cancel(self) -> None:
        """End it now; also from another thread, and after the end."""


class PutStream(Protocol):
    """One reply per chunk of a put, in order. The steps are taken, in any thread, while the replies are waited for.

    Iterating raises TransferError, and only that: a `steps` iterator that fails ends the put with the reason
    `cancelled`, and nothing of the unfinished chunk is stored. Replies that are not iterated to their end must be
    cancelled.
    """

    @property
    def moved_at_s(self) -> float:
        """As a ReadStream's."""

    @property
    def incomplete_bytes(self) -> int:
        """As a ReadStream's."""

    def __iter__(self) -> Iterator[pb.PutReply]: ...

    def cancel(self) -> None:
        """End it now; also from another thread, and after the end. Chunks that were acknowledged stay stored."""


class Memory(Protocol):
    """Where received bytes lie."""

    def take(self, size_bytes: int) -> memoryview:
        """Writable memory for the next bytes: for `size_bytes` of them, or for fewer, and then it is asked again."""


class Transport(Protocol):
    """One storage node's data path. Thread-safe: several streams may be under way."""

    def read(self, request: pb.ReadRequest, timeout_s: float, memory: Memory | None = None) -> ReadStream:
        """Start reading; all of it has to arrive within `timeout_s`.

        Who gives `memory` has the bytes received there, range after range, where the transport receives in place: a
        piece's `data` is then the very view that `take` returned. Otherwise its pieces lie in memory of its own."""

    def put(self, steps: Iterator[pb.PutRequest | memoryview], timeout_s: float) -> PutStream:
        """Start storing chunks. Each goes start, data..., end or revoke; a memoryview is data, and what it shows must
        stay until its chunk was answered."""
