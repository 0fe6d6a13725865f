"""The server of the bulk port: accepts, limits and closes connections."""

import contextlib
import logging
import socket
import ssl
import threading
import time

from kvstore_api.affinity import AffinityPolicy, shared_where_local
from kvstore_api.byte_stream import ByteStream
from kvstore_cluster.background import BackgroundLoop
from kvstore_cluster.node import StorageNode
from kvstore_service.bulk_server.caller import BulkCaller
from kvstore_service.bulk_server.places import NoPlaceError, Places
from kvstore_service.bulk_server.session import RefusedError, Session
from kvstore_service.chunk_source import ChunkSource
from kvstore_service.identity import OPEN, Access
from kvstore_service.large_requests import LargeRequests
from kvstore_service.listen import Address, address_error, network_of
from kvstore_service.tls import ServerTls
from kvstore_service.tracing import NodeTracing
from kvstore_service.waiting_room import WaitingRoom

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 256
"""Most open connections of identified callers. Each has a thread, and reads or writes at most one chunk at a time. One
more connection closes the one that has been idle longest, or is refused if none is idle."""
MAX_CONNECTIONS_OF_TENANT = 192
"""Of these, most of one tenant, where there are credentials."""
MAX_STRANGERS = 128
"""Most open connections of callers that are not identified yet. One more closes another (`WaitingRoom`)."""
STRANGER_BYTES = 50 << 10
"""Memory of such a connection. Measured with 100 (benchmarks/floods.py --memory)."""
STRANGER_S = 5.0
"""Time limit to be identified: for TLS handshake, preface and token together."""
PATIENCE_S = 20.0
"""Time limit for sending 4 MiB to a client, or receiving 256 KiB from it. A slower client is disconnected, and its
chunks are released."""
IDLE_S = 600.0
"""A connection without a request for this long is closed. Clients reconnect."""
_RETRY_ACCEPT_S = 0.1


class BulkServer:
    """Serves a node from construction until `stop`. Raises AddressInUseError."""

    def __init__(
        self,
        node: StorageNode,
        address: Address,
        *,
        advertise_host: str | None = None,
        tls: ServerTls | None = None,
        source: ChunkSource | None = None,
        large: LargeRequests | None = None,
        max_connections: int = MAX_CONNECTIONS,
        max_of_tenant: int = MAX_CONNECTIONS_OF_TENANT,
        max_strangers: int = MAX_STRANGERS,
        stranger_s: float = STRANGER_S,
        patience_s: float = PATIENCE_S,
        idle_s: float = IDLE_S,
        affinity: AffinityPolicy = shared_where_local,
        access: Access = OPEN,
        tracing: NodeTracing | None = None,
    ) -> None:
        self._node = node
        self._tracing = tracing
        self._access = access
        self._tls = tls
        self._source: ChunkSource = source or node
        self._large = large or LargeRequests()
        self._max_connections = max_connections + 2 * max_strangers  # those that are being closed included
        self._stranger_s = stranger_s
        self._patience_s = patience_s
        self._idle_s = idle_s
        self._affinity = affinity
        try:
            self._listener = socket.create_server(
                (address.host, address.port),
                family=socket.AF_INET6 if ":" in address.host else socket.AF_INET,
                backlog=128,
            )
        except OSError as error:
            raise address_error(address, error.strerror or str(error)) from error
        host = advertise_host or address.reachable_host
        self.address = str(Address(host, self._listener.getsockname()[1]))
        self._lock = threading.Lock()
        self._stopping = False
        self._connections: dict[ByteStream, threading.Thread] = {}
        self._strangers: WaitingRoom[ByteStream] = WaitingRoom(max_strangers)
        self._places = Places(max_connections, max_connections if access.is_open else max_of_tenant)
        self._acceptor = BackgroundLoop("kvstore-bulk-accept", self._accept)
        self._acceptor.start()

    def stop(self, grace_s: float = 1.0) -> None:
        """Refuses new connections and closes idle ones at once. Running requests get `grace_s` to end. Blocks until all
        threads have ended."""
        until = time.monotonic() + grace_s
        with self._lock:
            self._stopping = True
            connections = dict(self._connections)
            for stream in (*self._strangers, *self._places.idle):
                stream.abort()
        with contextlib.suppress(OSError):  # the kernel reports "not connected", but the acceptor wakes up
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._acceptor.stop()
        for thread in connections.values():
            thread.join(max(0.0, until - time.monotonic()))
        for stream, thread in connections.items():
            stream.abort()
            thread.join()

    def _accept(self) -> None:
        try:
            connected, peer = self._listener.accept()
        except OSError as error:
            if not self._stopping:
                log.warning("the bulk port of %s cannot accept: %s", self._node.node_id, error)
                # Most likely the process is out of file descriptors; a closed file may free one.
                self._acceptor.stopping.wait(_RETRY_ACCEPT_S)
            return
        try:
            self._begin(connected, Address(peer[0], peer[1]))
        except (OSError, RuntimeError) as error:  # the client has disconnected, or no thread can start
            log.warning("a bulk connection from %s was not served: %s", peer[0], error)
            connected.close()
        except BaseException:
            connected.close()
            raise

    def _begin(self, connected: socket.socket, peer: Address) -> None:
        if self._tls is not None:
            context = self._tls.context()
            connected = context.wrap_socket(connected, server_side=True, do_handshake_on_connect=False)
        stream = ByteStream(connected, self._affinity)
        thread = threading.Thread(
            target=self._serve, args=(stream, str(peer)), name="kvstore-bulk", daemon=True
        )
        with self._lock:
            if self._stopping or len(self._connections) >= self._max_connections:
                stream.close()
                return
            thread.start()
            self._connections[stream] = thread
            out = self._strangers.add(stream, network_of(peer.host))
            if out is not None:
                out.abort()

    def _serve(self, stream: ByteStream, peer: str) -> None:
        try:
            self._serve_requests(stream, peer)
        except (TimeoutError, ssl.SSLError) as error:
            log.info("bulk connection from %s closed: %s", peer, error)
        except ConnectionError as error:
            log.debug("bulk connection from %s ended: %s", peer, error)
        except Exception:
            log.exception("bulk connection from %s failed", peer)
        finally:
            with self._lock:
                del self._connections[stream]
                self._strangers.remove(stream)
                self._places.leave(stream)
                stream.close()

    def _serve_requests(self, stream: ByteStream, peer: str) -> None:
        session = Session(
            self._node,
            stream,
            self._source,
            self._large,
            access=self._access,
            peer=peer,
            patience_s=self._patience_s,
            idle_s=self._idle_s,
            stranger_s=self._stranger_s,
            tracing=self._tracing,
        )
        try:
            session.greet()
            while self._wait_begins(stream, session.caller):
                session.wait()
                with self._lock:
                    self._places.set_busy(stream)
                session.serve()
        except RefusedError as refusal:
            session.refuse(str(refusal))

    def _wait_begins(self, stream: ByteStream, caller: BulkCaller) -> bool:
        """Marks the connection as idle, and gives it a place once its caller is known. Returns False if the server is
        stopping and serves no further request. Raises RefusedError if there is no place."""
        with self._lock:
            if caller.is_known and stream in self._strangers:
                try:
                    out = self._places.take(stream, caller.share)
                except NoPlaceError as error:
                    raise RefusedError(str(error)) from error
                self._strangers.remove(stream)
                if out is not None:
                    out.abort()
            self._places.set_idle(stream)
            # A connection in neither was closed for another one; what it had sent before is not served.
            return not self._stopping and (stream in self._places or stream in self._strangers)


def serve_bulk(
    node: StorageNode,
    *,
    host: str,
    port: int = 0,
    advertise_host: str | None = None,
    tls: ServerTls | None = None,
    source: ChunkSource | None = None,
    large: LargeRequests | None = None,
    access: Access = OPEN,
    tracing: NodeTracing | None = None,
) -> BulkServer:
    """Starts the node's bulk server on `port` of `host`; 0 selects a free port. `large` is shared with the node's gRPC
    server. Raises AddressInUseError."""
    return BulkServer(
        node,
        Address(host, port),
        advertise_host=advertise_host,
        tls=tls,
        source=source,
        large=large,
        access=access,
        tracing=tracing,
    )
