"""Handlers that interceptors make are made once, and those of methods that nobody serves never."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from kvstore_service.wrapped_handlers import HandlerWrapper


class Counting(HandlerWrapper):
    def __init__(self) -> None:
        super().__init__()
        self.made: Counter[str] = Counter()

    def wrap(self, handler: grpc.RpcMethodHandler, method: str) -> grpc.RpcMethodHandler:
        self.made[method] += 1
        return grpc.unary_unary_rpc_method_handler(
            handler.unary_unary, handler.request_deserializer, handler.response_serializer
        )


def test_a_handler_is_made_once_a_method_at_every_depth() -> None:
    outer, inner = Counting(), Counting()
    with ThreadPoolExecutor(2) as pool:
        server = grpc.server(pool, interceptors=[outer, inner])
        health_pb2_grpc.add_HealthServicer_to_server(health.HealthServicer(), server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            for _ in range(3):
                stub.Check(health_pb2.HealthCheckRequest())
                with pytest.raises(grpc.RpcError, match="UNIMPLEMENTED"):
                    channel.unary_unary("/grpc.health.v1.Health/Guess")(b"")
        server.stop(0).wait()
    assert outer.made == inner.made == {"/grpc.health.v1.Health/Check": 1}
