"""The gRPC server of every endpoint: limits, health, reflection and an orderly stop."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from kvstore_codec.errors import MalformedRequestError
from kvstore_service.background_health import HealthWithBackground
from kvstore_service.freed_memory import FreedMemory
from kvstore_service.grpc_status import reported
from kvstore_service.identity import OPEN, Access
from kvstore_service.identity.guard import Guard
from kvstore_service.large_requests import LargeRequests
from kvstore_service.listen import Address, address_error
from kvstore_service.request_fields import require_few_fields
from kvstore_service.request_log import RequestLog
from kvstore_service.shares import Shares
from kvstore_service.stalled_streams import StalledStreams
from kvstore_service.tls import ServerTls
from kvstore_service.unary_requests import THREADS, UnaryRequests
from kvstore_service.unsent_answers import UnsentAnswers
from kvstore_service.wrapped_handlers import HandlerWrapper

MAX_MESSAGE_BYTES = 8 << 20
SMALL_REQUEST_BYTES = 16 << 10
"""Size limit of a request that names no chunks."""
# One LookupReply contains the headers of all chunks that were found.
MAX_REPLY_BYTES = 64 << 20
# A running call holds a thread. Streams (bulk data, reflection) may last long, so together they must not take all
# threads: lookups and leases are answered however many streams are open.
MAX_STREAMS = 192
MAX_STREAMS_OF_TENANT = 128
"""Of these, streams of one tenant, where there are credentials."""
_THREADS = MAX_STREAMS + THREADS + 32
"""The last ones are for calls that are refused: no call waits in them."""
# Calls that run or wait for a thread. Further calls are refused before their request is received.
MAX_CALLS = 1024
MAX_CALLS_OF_CONNECTION = MAX_STREAMS + 64
"""Open calls of one connection, including those whose answer the client has not read. A client holds back further
calls until some have ended. If it does not, they are refused before they use memory."""
MAX_CONNECTIONS = 4096
"""Open connections of one port. gRPC closes further ones at once. A client needs one."""
STRANGER_BYTES = 47 << 10
"""Memory of a connection after its TLS handshake. Measured with 1,000 (benchmarks/floods.py --memory)."""
HANDSHAKE_S = 10.0
"""Time limit for the handshakes of TLS and HTTP/2 together."""
IDLE_S = 120.0
"""A connection without a call for this long is closed. Clients reconnect."""
MAX_METADATA_BYTES = 16 << 10
"""Most bytes of the headers of a call. Of calls with more than half of that, gRPC refuses some."""
_HEALTH = f"/{health.SERVICE_NAME}/"

_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_REPLY_BYTES),
    ("grpc.max_concurrent_streams", MAX_CALLS_OF_CONNECTION),
    ("grpc.max_allowed_incoming_connections", MAX_CONNECTIONS),
    ("grpc.server_handshake_timeout_ms", round(1000 * HANDSHAKE_S)),
    ("grpc.max_connection_idle_ms", round(1000 * IDLE_S)),
    ("grpc.max_metadata_size", MAX_METADATA_BYTES // 2),
    ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES),
    # Reservation (listen.py) has checked that no other process listens there.
    ("grpc.so_reuseport", 1),
    # Detects clients whose machine or link is down, and releases the resources of their streams.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 1_000),
]


class GrpcServer:
    """Serves the `handlers` of one service from construction until `stop`, to the callers that `access` admits. Servers
    of the same node share `large`, which limits their large requests. Raises AddressInUseError."""

    def __init__(
        self,
        address: Address,
        service: str,
        handlers: dict[str, grpc.RpcMethodHandler],
        *,
        advertise_host: str | None = None,
        large: LargeRequests | None = None,
        access: Access = OPEN,
        tls: ServerTls | None = None,
    ) -> None:
        self._pool = ThreadPoolExecutor(_THREADS, "kvstore-rpc")
        self._stalled = StalledStreams()
        self._memory = FreedMemory()
        guards = [] if access.is_open else [Guard(access)]
        self._unary = UnaryRequests(self._stalled, access)
        limits = [
            self._unary,
            _StreamLimits(self._stalled, access),
            _RequestLimits(large or LargeRequests()),
        ]
        self._server = grpc.server(
            self._pool,
            interceptors=[*guards, *limits, RequestLog()],
            options=_OPTIONS,
            maximum_concurrent_rpcs=MAX_CALLS,
        )
        self._health = HealthWithBackground(
            experimental_non_blocking=True, experimental_thread_pool=self._pool
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
        reflection.enable_server_reflection(
            (service, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server
        )
        try:
            if tls is None:
                port = self._server.add_insecure_port(str(address))
            else:
                port = self._server.add_secure_port(str(address), tls.grpc_credentials())
        except RuntimeError as error:
            self._pool.shutdown()
            self._stalled.stop()
            self._memory.stop()
            self._unary.stop()
            raise address_error(address, "it is in use or not an address of this machine") from error
        host = advertise_host or address.reachable_host
        self.address = str(Address(host, port))
        for name in ("", service):
            self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        self._server.start()

    def stop(self, grace_s: float = 1.0) -> None:
        """Refuses new calls with UNAVAILABLE. Running calls get `grace_s` to end, and are then cancelled. Blocks until
        all have ended."""
        self._health.enter_graceful_shutdown()
        self._server.stop(grace_s).wait()
        self._stalled.stop()
        self._memory.stop()
        self._pool.shutdown()
        self._unary.stop()


class _StreamLimits(HandlerWrapper):
    """Refuses a stream if too many are open, and cancels a stream whose client neither reads nor sends."""

    def __init__(self, stalled: StalledStreams, access: Access) -> None:
        super().__init__()
        self._stalled, self._access = stalled, access
        self._open = Shares("streams")

    def wrap(self, handler: grpc.RpcMethodHandler, method: str) -> grpc.RpcMethodHandler:
        # Health calls hold no thread, not even `Watch`.
        if method.startswith(_HEALTH):
            return handler
        if handler.stream_stream:
            limited = grpc.stream_stream_rpc_method_handler
            serve: Callable[..., object] = self._answering_with_many(handler.stream_stream, takes_many=True)
        elif handler.unary_stream:
            limited = grpc.unary_stream_rpc_method_handler
            serve = self._answering_with_many(handler.unary_stream)
        elif handler.stream_unary:
            limited = grpc.stream_unary_rpc_method_handler
            serve = self._answering_with_one(handler.stream_unary)
        else:
            return handler
        return limited(serve, handler.request_deserializer, handler.response_serializer)

    def _answering_with_many(
        self, serve: Callable[..., Iterator[object]], *, takes_many: bool = False
    ) -> Callable[..., Iterator[object]]:
        def serve_if_free(request: Any, context: grpc.ServicerContext) -> Iterator[object]:
            with self._stream(context):
                asked = self._stalled.received(request, context) if takes_many else request
                del request
                yield from self._stalled.watched(serve(asked, context), context)

        return serve_if_free

    def _answering_with_one(self, serve: Callable[..., object]) -> Callable[..., object]:
        def serve_if_free(requests: Iterator[object], context: grpc.ServicerContext) -> object:
            with self._stream(context):
                return serve(self._stalled.received(requests, context), context)

        return serve_if_free

    @contextmanager
    def _stream(self, context: grpc.ServicerContext) -> Iterator[None]:
        with reported(context):
            tenant = "" if self._access.is_open else self._access.whose(context)
            most = MAX_STREAMS if self._access.is_open else MAX_STREAMS_OF_TENANT
            with self._open.taken(tenant, most=MAX_STREAMS, most_of_tenant=most):
                yield


class _RequestLimits(HandlerWrapper):
    """Parses and serves a request once LargeRequests admits it. The steps of a client's stream are small and always
    admitted. gRPC itself would parse requests in the single thread that all calls pass through, and parsing 65,536
    chunk references takes as long as looking them up."""

    def __init__(self, large: LargeRequests) -> None:
        super().__init__()
        self._large = large
        self._unsent = UnsentAnswers()

    def wrap(self, handler: grpc.RpcMethodHandler, method: str) -> grpc.RpcMethodHandler:
        if method.startswith(_HEALTH):
            return handler
        name = method.rpartition("/")[2] + "Request"
        if handler.stream_stream:
            return grpc.stream_stream_rpc_method_handler(
                self._taking_many(handler, name), response_serializer=handler.response_serializer
            )
        if handler.stream_unary:
            return grpc.stream_unary_rpc_method_handler(
                self._taking_many_for_one(handler, name), response_serializer=handler.response_serializer
            )
        if handler.unary_unary:
            return grpc.unary_unary_rpc_method_handler(self._answering_with_one(handler, name))
        return grpc.unary_stream_rpc_method_handler(
            self._answering_with_many(handler, name), response_serializer=handler.response_serializer
        )

    def _answering_with_one(self, handler: grpc.RpcMethodHandler, name: str) -> Callable[..., bytes]:
        def serve(data: bytes, context: grpc.ServicerContext) -> bytes:
            answer: bytes = b""
            try:
                with reported(context), self._admitted(data, context):
                    request = _parsed(handler, name, data)
                    answer = handler.response_serializer(handler.unary_unary(request, context))
                return answer
            finally:  # a refusal also waits in memory until the client reads it
                self._unsent.add(context, len(answer))

        return serve

    def _answering_with_many(
        self, handler: grpc.RpcMethodHandler, name: str
    ) -> Callable[..., Iterator[object]]:
        def serve(data: bytes, context: grpc.ServicerContext) -> Iterator[object]:
            with reported(context), self._large.kept(context.peer(), size_bytes=len(data)):
                with self._admitted(data, context):
                    request = _parsed(handler, name, data)
                del data
                yield from handler.unary_stream(request, context)

        return serve

    def _taking_many(self, handler: grpc.RpcMethodHandler, name: str) -> Callable[..., Iterator[object]]:
        def serve(messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[object]:
            with reported(context):
                yield from handler.stream_stream(_steps(handler, messages, name), context)

        return serve

    def _taking_many_for_one(self, handler: grpc.RpcMethodHandler, name: str) -> Callable[..., object]:
        def serve(messages: Iterator[bytes], context: grpc.ServicerContext) -> object:
            with reported(context):
                return handler.stream_unary(_steps(handler, messages, name), context)

        return serve

    def _admitted(self, data: bytes, context: grpc.ServicerContext) -> AbstractContextManager[None]:
        return self._large.admitted(context.peer(), context.is_active, size_bytes=len(data))


def _steps(handler: grpc.RpcMethodHandler, messages: Iterator[bytes], name: str) -> Iterator[object]:
    """Parsed steps of a stream. Does not keep a step in memory while it waits for the next one."""
    return map(partial(_parsed, handler, name), messages)


def _parsed(handler: grpc.RpcMethodHandler, name: str, data: bytes) -> object:
    require_few_fields(data, name)
    try:
        return handler.request_deserializer(data)
    except DecodeError as error:
        raise MalformedRequestError(f"not a {name}: {error}") from error


def parser(request: type, max_bytes: int = SMALL_REQUEST_BYTES) -> Callable[[bytes], object]:
    """A parser of messages of type `request`. It raises MalformedRequestError for a message of more than `max_bytes`,
    and DecodeError."""

    def parse(data: bytes) -> object:
        if len(data) > max_bytes:
            raise MalformedRequestError(f"a {request.__name__} has {len(data)} bytes; at most {max_bytes}")
        return request.FromString(data)  # type: ignore[attr-defined]

    return parse


def unary(
    method: Callable[..., object], request: type, max_bytes: int = SMALL_REQUEST_BYTES
) -> grpc.RpcMethodHandler:
    """A handler of a call that takes one message of type `request`, of at most `max_bytes`, and returns one message."""
    return grpc.unary_unary_rpc_method_handler(
        method,
        request_deserializer=parser(request, max_bytes),
        response_serializer=lambda reply: reply.SerializeToString(),
    )
