"""One request to the bulk port: its connection, its remaining time, and its end."""

import math
import ssl
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

from kvstore_api import frames
from kvstore_api.byte_stream import ByteStream
from kvstore_api.frames import FrameHeader, FrameKind, unpack_header
from kvstore_client.transport.connections import Connections
from kvstore_codec.errors import TransferError

CONNECT_TIMEOUT_S = 1.0


class UnreachableError(Exception):
    """The bulk port does not answer: connecting failed, or a new connection ended before its first answer."""


class Exchange:
    """Used by one thread, except for `cancel`. Ends with `complete` or `break_off`."""

    def __init__(self, connections: Connections, timeout_s: float) -> None:
        self._connections = connections
        self._until = time.monotonic() + timeout_s
        self._lock = threading.Lock()
        self._stream: ByteStream | None = None
        self._resting = True
        self._cancelled = False
        self._header = bytearray(frames.HEADER_BYTES)
        self.is_unproven = False
        """Whether the connection is reused from another request and may have ended unnoticed."""
        self._is_new = False
        self._is_answered = False
        self._received_bytes = 0
        """Bytes received on the connection before the current receive."""

    @property
    def is_open(self) -> bool:
        return self._stream is not None

    @property
    def moved_at_s(self) -> float:
        """Monotonic time at which bytes last arrived."""
        stream = self._stream
        return stream.received_at_s if stream is not None else -math.inf

    @property
    def incomplete_bytes(self) -> int:
        """Bytes received since `receive_into` last returned."""
        stream = self._stream
        return stream.received_bytes - self._received_bytes if stream is not None else 0

    @property
    def is_cancelled(self) -> bool:
        return self._cancelled

    def remaining_s(self) -> float:
        return max(0.0, self._until - time.monotonic())

    def open(self, *, fresh: bool = False) -> None:
        """Acquire a connection. Raises UnreachableError."""
        stream = None if fresh else self._connections.acquire_idle()
        self.is_unproven = stream is not None
        self._is_new = stream is None
        if stream is None:
            try:
                stream = self._connections.connect(min(CONNECT_TIMEOUT_S, self.remaining_s() + 1e-3))
            except ssl.SSLError as error:
                raise TransferError("tls", f"TLS with {self._connections.name} failed: {error}") from error
            except OSError as error:
                raise UnreachableError(
                    f"the bulk port of {self._connections.name} cannot be reached: {error}"
                ) from error
        with self._lock:
            self._received_bytes = stream.received_bytes
            self._stream = stream
            if self._cancelled:
                stream.abort()

    def open_again(self) -> None:
        """Replace a reused connection that has ended: the node was restarted, so the other idle ones have ended, too.
        Raises UnreachableError."""
        self.break_off()
        self._connections.drop_idle()
        self.open(fresh=True)

    def proven(self) -> None:
        self.is_unproven = False

    def staying(self, *, anew: bool) -> AbstractContextManager[None]:
        """Context for sending and receiving; see Affinity.staying."""
        return self._connected().affinity.staying(anew=anew)

    def send(self, views: Sequence[memoryview | bytes]) -> None:
        self._connected().send(views, self.remaining_s())

    def receive_into(self, view: memoryview | bytearray) -> None:
        stream = self._connected()
        self._received_bytes = stream.received_bytes
        stream.receive_into(view, self.remaining_s())
        self._received_bytes = stream.received_bytes

    def receive_header(self, *kinds: FrameKind) -> FrameHeader:
        """Receive the header of the next answer. Raises TransferError when it is of none of these kinds."""
        self.receive_into(self._header)
        self._is_answered = True
        header = unpack_header(self._header)
        if header.kind == FrameKind.REFUSED:
            text = self.receive_message(header)
            raise TransferError(
                "refused", f"{self._connections.name} refused: {text.decode(errors='replace')}"
            )
        if header.kind not in kinds:
            raise self.misunderstood(f"an answer of kind {header.kind} instead of {kinds[0].name}")
        return header

    def receive_message(self, header: FrameHeader) -> bytes:
        if header.length > frames.MAX_TEXT_BYTES:
            raise self.misunderstood(f"a message of {header.length} bytes")
        message = bytearray(header.length)
        self.receive_into(message)
        return bytes(message)

    def misunderstood(self, what: str) -> TransferError:
        return TransferError("protocol", f"{self._connections.name} sent {what}")

    def rest(self, *, resting: bool) -> None:
        """While the exchange rests nothing is in progress, and `cancel` leaves the connection to others."""
        with self._lock:
            self._resting = resting

    def complete(self) -> None:
        """End the exchange after its last answer, and release the connection."""
        with self._lock:
            stream, self._stream = self._stream, None
        if stream is not None:
            self._connections.release(stream)

    def break_off(self) -> None:
        with self._lock:
            stream, self._stream = self._stream, None
            if stream is not None:
                stream.reset()

    def cancel(self) -> None:
        """End the exchange from any thread: whoever waits for it gets an error."""
        with self._lock:
            self._cancelled = True
            stream = self._stream
            if stream is None:
                return
            if not self._resting:
                stream.abort()
                return
            self._stream = None
        self._connections.release(stream)

    @contextmanager
    def beginning(self) -> Iterator[None]:
        """Context for what may be the first answer. Raises UnreachableError when a new connection ends before it, as
        connections do to a port that speaks TLS, or that has too many connections."""
        try:
            yield
        except ConnectionError as error:
            if not self._is_new or self._is_answered or self._cancelled:
                raise
            raise UnreachableError(
                f"the bulk port of {self._connections.name} closed a new connection: {error}"
            ) from error

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Context that breaks the exchange off after any error and raises it as TransferError."""
        try:
            yield
        except (OSError, UnreachableError) as error:
            timeout = isinstance(error, TimeoutError) or not self.remaining_s()
            # In TLS 1.3 a server refuses a client's certificate only after the client's part of the handshake.
            failed = "tls" if isinstance(error, ssl.SSLError) else "unreachable"
            reason = "cancelled" if self._cancelled else "timeout" if timeout else failed
            raise TransferError(reason, f"{self._connections.name}: {error}") from error
        finally:
            self.break_off()

    def _connected(self) -> ByteStream:
        stream = self._stream
        if stream is None:
            raise ConnectionAbortedError("the exchange has ended")
        return stream
