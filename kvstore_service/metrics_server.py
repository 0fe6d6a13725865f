"""The HTTP server of a cluster's metrics and status page."""

import base64
import binascii
import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from io import BufferedIOBase, BufferedReader, TextIOBase
from socketserver import ThreadingMixIn
from typing import Any, cast
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, make_wsgi_app

from kvstore_api.byte_stream import certificate_names
from kvstore_codec.errors import RequestError, UnauthenticatedError
from kvstore_service.identity import Access
from kvstore_service.identity.access import bearer_token
from kvstore_service.identity.verbs import METRICS
from kvstore_service.listen import Address, address_error, network_of
from kvstore_service.observability.status_page import PATHS, StartResponse, StatusPage
from kvstore_service.security import INSECURE, Security
from kvstore_service.tls import ServerTls
from kvstore_service.waiting_room import WaitingRoom

log = logging.getLogger(__name__)

PATIENCE_S = 5.0
"""Time limit for receiving a whole request, TLS handshake included."""
MAX_REQUEST_BYTES = 16 << 10
MAX_CONNECTIONS = 64
"""Most open connections whose request has not been received yet. Each has a thread. One more closes another
(`WaitingRoom`)."""
STRANGER_BYTES = 36 << 10
"""Memory of such a connection. Measured with 30 (benchmarks/floods.py --memory)."""
MAX_SCRAPES = 8
"""Most requests that are being answered. Others get 503."""
_RETRY_ACCEPT_S = 0.1
_NAMES = "kvstore.certificate_names"

_REALM = "kvstore: any name, and a token as the password"

App = Callable[[dict[str, Any], StartResponse], Iterable[bytes]]


@contextmanager
def metrics_endpoint(
    address: Address, security: Security = INSECURE, page: StatusPage | None = None
) -> Iterator[CollectorRegistry]:
    """Serves the metrics of the yielded registry over HTTP at /metrics, and with a `page` that page at / and its data
    at /status.json. If the cluster has credentials, only to callers that may read metrics. Raises AddressInUseError and
    ConfigurationError."""
    registry, access = CollectorRegistry(), security.access()
    tls = security.server_tls()
    try:
        server = _Server(address, tls)
    except OSError as error:
        raise address_error(address, error.strerror or str(error)) from error
    app = _few_at_once(_with_page(make_wsgi_app(registry), page))
    server.set_app(app if access.is_open else _guarded(app, access))
    thread = threading.Thread(target=server.serve_forever, name="kvstore-metrics", daemon=True)
    access.start()
    thread.start()
    try:
        yield registry
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
        access.stop()


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: Address, tls: ServerTls | None) -> None:
        self._tls = tls
        self._lock = threading.Lock()
        self._open = 0
        self._strangers: WaitingRoom[socket.socket] = WaitingRoom(MAX_CONNECTIONS)
        self._accepted_s: dict[socket.socket, float] = {}
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
        self.address_family, _, _, _, target = found[0]
        super().__init__((str(target[0]), int(target[1])), _Handler)

    def server_bind(self) -> None:
        """Without the name service, which the base class would wait for."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()

    def get_request(self) -> tuple[socket.socket, Any]:
        try:
            connected, peer = super().get_request()
        except OSError:
            # Most likely the process is out of file descriptors. Without a wait, the next attempt would follow at once.
            time.sleep(_RETRY_ACCEPT_S)
            raise
        if self._tls is not None:  # the handshake is done by the thread of the connection
            context = self._tls.context()
            connected = context.wrap_socket(connected, server_side=True, do_handshake_on_connect=False)
        return connected, peer

    def process_request(self, request: Any, client_address: Any) -> None:
        """Starts a thread for the connection, and closes another one if there are too many."""
        with self._lock:
            if self._open >= 2 * MAX_CONNECTIONS:  # those that are being closed or answered included
                self.shutdown_request(request)
                return
            self._open += 1
            self._accepted_s[request] = time.monotonic()
            out = self._strangers.add(request, network_of(client_address[0]))
        if out is not None:
            _abort(out)
        try:
            super().process_request(request, client_address)
        except BaseException:  # no thread is left, which the base class reports
            self._ended(request)
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._ended(request)

    def _ended(self, request: Any) -> None:
        with self._lock:
            self._open -= 1
            self._strangers.remove(request)
            del self._accepted_s[request]

    def received(self, request: socket.socket) -> None:
        """The whole request of a connection has been received."""
        with self._lock:
            self._strangers.remove(request)

    def service_actions(self) -> None:
        """Closes connections that send their request too slowly. Called at least twice a second."""
        limit_s = time.monotonic() - PATIENCE_S
        with self._lock:
            overdue = [one for one in self._strangers if self._accepted_s[one] < limit_s]
        for request in overdue:
            _abort(request)

    def handle_error(self, request: object, client_address: object) -> None:  # noqa: ARG002
        """Most often the client has disconnected, or failed its handshake."""
        log.debug("a request for metrics from %s ended early", client_address, exc_info=True)


class _Handler(WSGIRequestHandler):
    timeout = PATIENCE_S
    server: _Server

    def setup(self) -> None:
        super().setup()
        self.rfile = cast(BufferedReader, _Bounded(self.rfile))

    def get_environ(self) -> dict[str, Any]:
        self.server.received(self.connection)
        environ: dict[str, Any] = super().get_environ()
        connection = self.connection
        certificate = connection.getpeercert() if isinstance(connection, ssl.SSLSocket) else None
        return environ | {_NAMES: certificate_names(certificate or {})}

    def get_stderr(self) -> Any:
        """Where errors go, most of them of clients that disconnect before they read the answer."""
        return _Log()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the base class's name)
        """Requests are not logged."""


class _Log(TextIOBase):
    def write(self, text: str) -> int:
        log.debug("a request for metrics failed: %s", text.rstrip())
        return len(text)


class _Bounded:
    """The lines of a request, of at most MAX_REQUEST_BYTES together. Without it a stranger could send 6 MiB of
    headers."""

    def __init__(self, file: BufferedIOBase) -> None:
        self._file = file
        self._left = MAX_REQUEST_BYTES

    def readline(self, limit: int = -1) -> bytes:
        """Raises OSError beyond the limit, and when the client has disconnected: half a request is not served."""
        if not self._left:
            raise ConnectionAbortedError(f"a request for metrics has more than {MAX_REQUEST_BYTES} bytes")
        line = self._file.readline(min(limit, self._left) if limit >= 0 else self._left)
        self._left -= len(line)
        if not line:
            raise ConnectionAbortedError("the client disconnected in its request for metrics")
        return line

    def close(self) -> None:
        self._file.close()


def _abort(connection: socket.socket) -> None:
    """Makes the thread of a connection fail now."""
    with suppress(OSError):  # the connection has already ended
        # Not the TLS socket's own method, after which its other methods would continue without TLS.
        socket.socket.shutdown(connection, socket.SHUT_RDWR)


def _few_at_once(app: App) -> App:
    """The application, for at most MAX_SCRAPES requests at a time."""
    free = threading.BoundedSemaphore(MAX_SCRAPES)

    def serve(environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        if not free.acquire(blocking=False):
            start_response("503 Service Unavailable", [("Content-Type", "text/plain; charset=utf-8")])
            return [f"{MAX_SCRAPES} requests are already being answered; try again\n".encode()]
        try:
            return list(app(environ, start_response))
        finally:
            free.release()

    return serve


def _with_page(metrics: App, page: StatusPage | None) -> App:
    """The application of the metrics, which stay at every other path, and the page."""
    if page is None:
        return metrics

    def serve(environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        app = page if environ.get("PATH_INFO") in ("", *PATHS) else metrics
        return app(environ, start_response)

    return serve


def _token(authorization: str) -> str | None:
    """The token of a request: a bearer token, or the password of a browser that was asked for name and password."""
    kind, _, encoded = authorization.partition(" ")
    if kind.lower() != "basic":
        return bearer_token([("authorization", authorization)])
    try:
        return base64.b64decode(encoded, validate=True).decode().partition(":")[2]
    except (binascii.Error, UnicodeDecodeError):
        return ""


def _guarded(app: App, access: Access) -> App:
    """The application, for callers that may read metrics."""

    def serve(environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        try:
            token = _token(environ.get("HTTP_AUTHORIZATION", ""))
            caller = access.of_certificate(environ[_NAMES]) if token is None else access.of_token(token)
            METRICS.require(caller)
        except RequestError as error:
            unknown = isinstance(error, UnauthenticatedError)
            status = "401 Unauthorized" if unknown else "403 Forbidden"
            headers = [("Content-Type", "text/plain; charset=utf-8")]
            asked = [("WWW-Authenticate", "Bearer"), ("WWW-Authenticate", f'Basic realm="{_REALM}"')]
            start_response(status, [*headers, *asked] if unknown else headers)
            return [f"{error}\n".encode()]
        return app(environ, start_response)

    return serve
