"""gRPC calls that begin and never send their request, as bytes of HTTP/2: no gRPC library sends half a call."""

import contextlib
import socket
import ssl
from collections.abc import Iterator

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_HEADERS, _SETTINGS = 1, 4
_END_HEADERS = 4


@contextlib.contextmanager
def half_calls(
    address: str,
    method: str,
    count: int,
    token: str = "",
    *,
    source: str = "127.0.0.1",
    tls: ssl.SSLContext | None = None,
) -> Iterator[socket.socket]:
    """A connection from `source` with `count` calls of `method`, such as /grpc.health.v1.Health/Check, that have sent
    their headers. Raises OSError."""
    host, _, port = address.rpartition(":")
    with contextlib.ExitStack() as closing:
        connected = closing.enter_context(
            socket.create_connection((host, int(port)), 5, source_address=(source, 0))
        )
        if tls is not None:
            connected = closing.enter_context(tls.wrap_socket(connected, server_hostname=host))
        headers = {":method": "POST", ":scheme": "http" if tls is None else "https", ":path": method}
        headers |= {":authority": address, "content-type": "application/grpc", "te": "trailers"}
        if token:
            headers["authorization"] = f"Bearer {token}"
        block = b"".join(map(_literal, headers.items()))
        begun = (_frame(_HEADERS, _END_HEADERS, 1 + 2 * number, block) for number in range(count))
        connected.sendall(PREFACE + _frame(_SETTINGS, 0, 0, b"") + b"".join(begun))
        yield connected


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3) + bytes([kind, flags]) + stream.to_bytes(4) + payload


def _literal(header: tuple[str, str]) -> bytes:
    """A header that is not indexed (RFC 7541, 6.2.2). Each text is shorter than 127 bytes."""
    return b"\0" + b"".join(bytes([len(text)]) + text.encode() for text in header)
