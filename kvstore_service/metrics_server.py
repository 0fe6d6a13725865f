"""The HTTP server of a cluster's metrics."""

import logging
import socket
import ssl
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, make_wsgi_app

from kvstore_api.byte_stream import certificate_names
from kvstore_codec.errors import RequestError, UnauthenticatedError
from kvstore_service.identity import Access
from kvstore_service.identity.access import bearer_token
from kvstore_service.identity.verbs import METRICS
from kvstore_service.listen import Address, address_error
from kvstore_service.security import INSECURE, Security
from kvstore_service.tls import ServerTls

log = logging.getLogger(__name__)

PATIENCE_S = 10.0
"""Time limit for receiving a request, TLS handshake included."""
_NAMES = "kvstore.certificate_names"

StartResponse = Callable[[str, list[tuple[str, str]]], object]


@contextmanager
def metrics_endpoint(address: Address, security: Security = INSECURE) -> Iterator[CollectorRegistry]:
    """Serves the metrics of the yielded registry over HTTP at /metrics, to operators of every tenant if the cluster has
    credentials. Raises AddressInUseError and ConfigurationError."""
    registry, access = CollectorRegistry(), security.access()
    tls = security.server_tls()
    try:
        server = _Server(address, tls)
    except OSError as error:
        raise address_error(address, error.strerror or str(error)) from error
    server.set_app(make_wsgi_app(registry) if access.is_open else _guarded(make_wsgi_app(registry), access))
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

    def __init__(self, address: Address, tls: ServerTls | None) -> None:
        self._tls = tls
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
        connected, peer = super().get_request()
        if self._tls is not None:  # the handshake is done by the thread of the connection
            context = self._tls.context()
            connected = context.wrap_socket(connected, server_side=True, do_handshake_on_connect=False)
        return connected, peer

    def handle_error(self, request: object, client_address: object) -> None:  # noqa: ARG002
        """Most often the client has disconnected, or failed its handshake."""
        log.debug("a request for metrics from %s ended early", client_address, exc_info=True)


class _Handler(WSGIRequestHandler):
    timeout = PATIENCE_S

    def get_environ(self) -> dict[str, Any]:
        environ: dict[str, Any] = super().get_environ()
        connection = self.connection
        certificate = connection.getpeercert() if isinstance(connection, ssl.SSLSocket) else None
        return environ | {_NAMES: certificate_names(certificate or {})}

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the base class's name)
        """Requests are not logged."""


def _guarded(
    app: Callable[[dict[str, Any], StartResponse], Iterable[bytes]], access: Access
) -> Callable[[dict[str, Any], StartResponse], Iterable[bytes]]:
    """The application, for callers that may read metrics."""

    def serve(environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        try:
            token = bearer_token([("authorization", environ.get("HTTP_AUTHORIZATION", ""))])
            caller = access.of_certificate(environ[_NAMES]) if token is None else access.of_token(token)
            METRICS.require(caller)
        except RequestError as error:
            unknown = isinstance(error, UnauthenticatedError)
            status = "401 Unauthorized" if unknown else "403 Forbidden"
            headers = [("Content-Type", "text/plain; charset=utf-8")]
            start_response(status, [*headers, ("WWW-Authenticate", "Bearer")] if unknown else headers)
            return [f"{error}\n".encode()]
        return app(environ, start_response)

    return serve
