"""Transport over the bulk port, the fast path for KV bytes (wire format: kvstore_api.frames)."""

import logging
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Generic, Protocol, TypeVar

from kvstore_api.bulk import ReadPiece
from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_client.transport.base import Memory, Places, Transport
from kvstore_client.transport.connections import Connections
from kvstore_client.transport.exchange import Exchange, UnreachableError
from kvstore_client.transport.memory import ReceiveMemory
from kvstore_client.transport.put import Steps, put_chunks
from kvstore_client.transport.read import read_any_order, read_ranges

log = logging.getLogger(__name__)

_FALLBACK_S = 10.0
Message = TypeVar("Message", covariant=True)


class Stream(Protocol[Message]):
    @property
    def moved_at_s(self) -> float: ...

    @property
    def incomplete_bytes(self) -> int: ...

    def __iter__(self) -> Iterator[Message]: ...

    def cancel(self) -> None: ...


class BulkTransport:
    """A pool of connections to one node. While the port is unreachable, `fallback` is used instead, if there is one,
    and the port is tried again periodically."""

    def __init__(
        self, connections: Connections, memory: ReceiveMemory, fallback: Transport | None = None
    ) -> None:
        self._connections = connections
        self._memory = memory
        self._fallback = fallback
        self._fallback_until_s = 0.0

    def read(
        self, request: pb.ReadRequest, timeout_s: float, memory: Memory | None = None
    ) -> Stream[ReadPiece]:
        fallback = self._fallback
        if fallback is not None and self._is_avoided():
            return fallback.read(request, timeout_s)
        return BulkStream(
            Exchange(self._connections, timeout_s),
            partial(read_ranges, request=request, memory=self._memory if memory is None else memory),
            partial(fallback.read, request) if fallback is not None else None,
            self._avoid,
        )

    def read_frames(self, request: pb.ReadRequest, timeout_s: float, places: Places) -> Stream[ReadPiece]:
        fallback = self._fallback
        if fallback is not None and self._is_avoided():
            return fallback.read_frames(request, timeout_s, places)
        request.any_order = True
        return BulkStream(
            Exchange(self._connections, timeout_s),
            partial(read_any_order, request=request, places=places),
            (lambda left_s: fallback.read_frames(request, left_s, places)) if fallback is not None else None,
            self._avoid,
        )

    def put(self, steps: Iterator[pb.PutRequest | memoryview], timeout_s: float) -> Stream[pb.PutReply]:
        fallback = self._fallback
        if fallback is not None and self._is_avoided():
            return fallback.put(steps, timeout_s)
        kept = Steps(steps)
        return BulkStream(
            Exchange(self._connections, timeout_s),
            partial(put_chunks, steps=kept),
            (lambda left_s: fallback.put(kept.again(), left_s)) if fallback is not None else None,
            self._avoid,
        )

    def close(self) -> None:
        self._connections.close()

    def leave_to_parent(self) -> None:
        self._connections.leave_to_parent()

    def _is_avoided(self) -> bool:
        return time.monotonic() < self._fallback_until_s

    def _avoid(self, error: UnreachableError) -> None:
        log.warning("%s; gRPC is used for %g s", error, _FALLBACK_S)
        self._fallback_until_s = time.monotonic() + _FALLBACK_S


class BulkStream(Generic[Message]):
    """Answers of one exchange, or of the fallback's call when the bulk port is unreachable."""

    def __init__(
        self,
        exchange: Exchange,
        talk: Callable[[Exchange], Iterator[Message]],
        instead: Callable[[float], Stream[Message]] | None,
        avoid: Callable[[UnreachableError], None],
    ) -> None:
        self._exchange = exchange
        self._talk = talk
        self._instead = instead
        self._avoid = avoid
        self._other: Stream[Message] | None = None

    def __iter__(self) -> Iterator[Message]:
        with self._exchange.errors():
            try:
                self._exchange.open()
                yield from self._talk(self._exchange)
            except UnreachableError as error:
                if self._instead is None or self._exchange.is_cancelled or not self._exchange.remaining_s():
                    raise
                self._avoid(error)
                self._other = self._instead(self._exchange.remaining_s())
        if self._other is not None:
            if self._exchange.is_cancelled:
                self._other.cancel()
            yield from self._other

    @property
    def incomplete_bytes(self) -> int:
        return self._exchange.incomplete_bytes if self._other is None else self._other.incomplete_bytes

    @property
    def moved_at_s(self) -> float:
        return self._exchange.moved_at_s if self._other is None else self._other.moved_at_s

    def cancel(self) -> None:
        self._exchange.cancel()
        if self._other is not None:
            self._other.cancel()
