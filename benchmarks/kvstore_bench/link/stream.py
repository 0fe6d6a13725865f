"""Sends bytes over TCP as fast as the link allows. Stands for transfers of a system whose data no server here
stores."""

import socket
import threading
from types import TracebackType
from typing import Self

_PIECE_BYTES = 1 << 20


class ByteSource:
    """Context manager. A server at `address`: each line of a connection is a number, and it replies with that many
    bytes."""

    def __init__(self, host: str) -> None:
        self._listener = socket.create_server((host, 0))
        self.address = "{}:{}".format(*self._listener.getsockname())
        self._connections: dict[socket.socket, threading.Thread] = {}
        self._acceptor = threading.Thread(target=self._accept, name="byte-source", daemon=True)

    def __enter__(self) -> Self:
        self._acceptor.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._acceptor.join()
        self._listener.close()
        for connected, thread in self._connections.items():
            _end(connected)
            thread.join()

    def _accept(self) -> None:
        while True:
            try:
                connected, _ = self._listener.accept()
            except OSError:
                return  # closed
            thread = threading.Thread(target=self._serve, args=(connected,), name="byte-source", daemon=True)
            self._connections[connected] = thread
            thread.start()

    def _serve(self, connected: socket.socket) -> None:
        piece = memoryview(bytes(_PIECE_BYTES))
        with connected, connected.makefile("rb") as lines:
            try:
                for line in lines:
                    missing = int(line)
                    while missing:
                        missing -= connected.send(piece[: min(missing, _PIECE_BYTES)])
            except OSError:
                return  # the client closed the connection


class ByteStream:
    """Client of a ByteSource. Raises OSError when it cannot connect."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._connected = socket.create_connection((host, int(port)))
        self._buffer = bytearray(_PIECE_BYTES)

    def receive(self, size_bytes: int) -> None:
        """Requests and receives `size_bytes`. Blocks until all have arrived. Raises OSError when the source closed the
        connection."""
        self._connected.sendall(f"{size_bytes}\n".encode())
        while size_bytes:
            received = self._connected.recv_into(self._buffer, min(size_bytes, _PIECE_BYTES))
            if not received:
                raise ConnectionResetError("the byte source closed the connection")
            size_bytes -= received

    def close(self) -> None:
        self._connected.close()


def _end(connected: socket.socket) -> None:
    try:
        connected.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # closed already
