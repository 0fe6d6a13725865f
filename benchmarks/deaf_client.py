"""A gRPC client that sends requests but receives no replies: plain HTTP/2 with a flow-control window of 0 bytes."""

import contextlib
import socket
import struct
import threading

_DATA, _HEADERS, _RESET, _SETTINGS, _PING = 0, 1, 3, 4, 6
_END_STREAM, _ACKNOWLEDGE, _END_HEADERS = 1, 1, 4
_WINDOW_SETTING = 4
_FRAME_BYTES = 16_000
_CONNECT_S = 5.0
_SERVICE = "kvstore.v1.Storage"


class DeafClient:
    """Keeps one connection alive until `close`: it answers pings, but its window leaves no room for replies. Ignores
    the server's limit of concurrent calls."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._socket = socket.create_connection((host, int(port)))
        self._lock = threading.Lock()
        self._calls = 0
        self.ended: set[int] = set()
        """Numbers of the calls, from 0, that the server ended."""
        self.disconnected = threading.Event()
        """Set when the server has closed the connection."""
        self._ready = threading.Event()
        preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
        self._send(preface + _frame(_SETTINGS, 0, 0, struct.pack(">HI", _WINDOW_SETTING, 0)))
        threading.Thread(target=self._receive, daemon=True).start()
        self._ready.wait(_CONNECT_S)

    def ask(self, method: str, request: bytes) -> int:
        """Starts a call of the Storage service. Returns its number. Raises OSError when the connection is closed."""
        message = b"\0" + struct.pack(">I", len(request)) + request
        pieces = [message[at : at + _FRAME_BYTES] for at in range(0, len(message), _FRAME_BYTES)]
        with self._lock:
            number = self._calls
            self._calls += 1
            stream = 2 * number + 1
            frames = [_frame(_HEADERS, _END_HEADERS, stream, _headers(method))]
            frames += [_frame(_DATA, 0, stream, piece) for piece in pieces]
            frames.append(_frame(_DATA, _END_STREAM, stream, b""))
            self._socket.sendall(b"".join(frames))
        return number

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _send(self, data: bytes) -> None:
        with self._lock, contextlib.suppress(OSError):
            self._socket.sendall(data)

    def _receive(self) -> None:
        with contextlib.suppress(OSError), self._socket.makefile("rb") as incoming:
            while len(head := incoming.read(9)) == 9:
                kind, flags, stream = head[3], head[4], int.from_bytes(head[5:], "big")
                payload = incoming.read(int.from_bytes(head[:3], "big"))
                if kind in (_SETTINGS, _PING) and not flags & _ACKNOWLEDGE:
                    self._send(_frame(kind, _ACKNOWLEDGE, 0, payload if kind == _PING else b""))
                    self._ready.set()
                elif kind == _RESET or (kind == _HEADERS and flags & _END_STREAM):
                    self.ended.add(stream // 2)
        self.disconnected.set()


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def _headers(method: str) -> bytes:
    """Encodes the request headers (HPACK), each as a literal without an index."""
    fields = {
        ":method": "POST",
        ":scheme": "http",
        ":path": f"/{_SERVICE}/{method}",
        ":authority": "node",
        "content-type": "application/grpc",
        "te": "trailers",
    }
    texts = [text.encode() for field in fields.items() for text in field]
    literals = [bytes([len(text)]) + text for text in texts]
    return b"".join(b"\0" + name + value for name, value in zip(literals[::2], literals[1::2], strict=True))
