"""A gRPC server with what every endpoint of the service has: limits, health, reflection, a clean stop."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from kvstore_service.listen import Address, address_error

MAX_MESSAGE_BYTES = 8 << 20
# The header of every found chunk comes back in one LookupReply.
MAX_REPLY_BYTES = 64 << 20
# A call holds a thread while it runs. Streams of bulk data may last, so they may not take all threads: lookups,
# leases and health checks are answered however many streams are open.
MAX_STREAMS = 192
_THREADS = MAX_STREAMS + 32

_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_REPLY_BYTES),
    # Reservation (listen.py) has made sure that nobody else listens there.
    ("grpc.so_reuseport", 1),
    # A client whose machine or link is gone is noticed, and what its streams held is given back.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 1_000),
]


class GrpcServer:
    """Serves `handlers` of one service from construction until `stop`. Raises AddressInUseError."""

    def __init__(
        self,
        address: Address,
        service: str,
        handlers: dict[str, grpc.RpcMethodHandler],
        *,
        advertise_host: str | None = None,
    ) -> None:
        self._pool = ThreadPoolExecutor(_THREADS, "kvstore-rpc")
        self._server = grpc.server(self._pool, options=_OPTIONS)
        self._health = health.HealthServicer(
            experimental_non_blocking=True, experimental_thread_pool=self._pool
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
        reflection.enable_server_reflection(
            (service, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server
        )
        try:
            port = self._server.add_insecure_port(str(address))
        except RuntimeError as error:
            self._pool.shutdown()
            raise address_error(address, "it is in use or not an address of this machine") from error
        host = advertise_host or address.reachable_host
        self.address = str(Address(host, port))
        for name in ("", service):
            self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        self._server.start()

    def stop(self, grace_s: float = 1.0) -> None:
        """Refuses new calls at once, as UNAVAILABLE, gives those under way `grace_s`, then cancels them."""
        self._health.enter_graceful_shutdown()
        self._server.stop(grace_s).wait()
        self._pool.shutdown()


def unary(method: Callable[..., object], request: type) -> grpc.RpcMethodHandler:
    """A handler that takes one message of type `request` and returns one message."""
    return grpc.unary_unary_rpc_method_handler(
        method,
        request_deserializer=request.FromString,  # type: ignore[attr-defined]
        response_serializer=lambda reply: reply.SerializeToString(),
    )
