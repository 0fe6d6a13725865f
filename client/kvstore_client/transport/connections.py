"""Pool of connections to one node's bulk port."""

import socket
import ssl
import threading
import weakref
from collections import deque
from collections.abc import Callable

from kvstore_api.affinity import AffinityPolicy, shared_where_local
from kvstore_api.byte_stream import ByteStream
from kvstore_api.frames import PREFACE, FrameKind, pack_header

_IDLE_CONNECTIONS = 8


class Connections:
    """Thread-safe. An acquired connection belongs to the caller, who keeps it, closes it or releases it."""

    def __init__(
        self,
        host: str,
        port: int,
        tls: Callable[[], ssl.SSLContext | None],
        name: str,
        affinity: AffinityPolicy = shared_where_local,
        token: Callable[[], str] = str,
    ) -> None:
        """`tls` returns the TLS of a new connection, or None for plain TCP. `name` is the name that the certificate
        must prove. `token` returns the client's token, which each connection
        begins with unless it is empty."""
        self._address = (host, port)
        self._tls = tls
        self._affinity = affinity
        self._token = token
        self.name = name
        self._lock = threading.Lock()
        self._idle: deque[ByteStream] = deque()
        self._closed = False
        self._open: weakref.WeakKeyDictionary[ByteStream, str] = weakref.WeakKeyDictionary()
        """All live connections, acquired or idle, and the token that each began with."""

    def acquire_idle(self) -> ByteStream | None:
        """The most recently used idle connection that seems alive, if any. Connections that began with another token
        than the client has now are closed: the other token may soon be revoked."""
        token = self._token()
        while True:
            with self._lock:
                if not self._idle:
                    return None
                stream = self._idle.pop()
            if self._open.get(stream, token) == token and not stream.has_ended():
                return stream
            stream.close()

    def connect(self, timeout_s: float) -> ByteStream:
        """Open a new connection. Raises OSError."""
        connected = socket.create_connection(self._address, timeout_s)
        try:
            if (tls := self._tls()) is not None:
                connected = tls.wrap_socket(
                    connected, server_hostname=self.name, do_handshake_on_connect=False
                )
            stream = ByteStream(connected, self._affinity)
            stream.handshake(timeout_s)
            token = self._token()
            stream.send([PREFACE, *_introduction(token)], timeout_s)
        except BaseException:
            connected.close()
            raise
        self._open[stream] = token
        return stream

    def release(self, stream: ByteStream) -> None:
        """Return a connection whose last answer has been received completely."""
        with self._lock:
            if not self._closed and len(self._idle) < _IDLE_CONNECTIONS:
                self._idle.append(stream)
                return
        stream.close()

    def drop_idle(self) -> None:
        """Close all idle connections: the node was restarted, so they are dead."""
        with self._lock:
            idle, self._idle = self._idle, deque()
        for stream in idle:
            stream.close()

    def leave_to_parent(self) -> None:
        """In a forked child: close the child's copies of the sockets, which leaves the connections open."""
        for stream in list(self._open):
            stream.close()

    def close(self) -> None:
        with self._lock:
            self._closed = True
        self.drop_idle()


def _introduction(token: str) -> list[bytes]:
    """What a client with this token sends first."""
    return [pack_header(FrameKind.TOKEN, len(token)), token.encode()] if token else []
