"""Logs gRPC calls with the id of the request that they are made for."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import grpc

from kvstore_client.request_id import METADATA_KEY, plain_id, request_scope

log = logging.getLogger(__name__)

SLOW_S = 1.0
"""A call that takes longer is logged as INFO, the others as DEBUG. Streams may last long."""


class RequestLog(grpc.ServerInterceptor):  # type: ignore[misc]
    """Lines that are logged while a call is served have its request id. Logs one line for a call, however many chunks
    it names."""

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler | None],
        details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        handler = continuation(details)
        named = [value for key, value in details.invocation_metadata or () if key == METADATA_KEY]
        if handler is None or not named or not isinstance(named[0], str):
            return handler
        request_id, method = plain_id(named[0]), details.method.rpartition("/")[2]
        kind, serve = next(
            (kind, getattr(handler, kind))
            for kind in ("unary_unary", "unary_stream", "stream_unary", "stream_stream")
            if getattr(handler, kind) is not None
        )
        if getattr(serve, "experimental_non_blocking", False):  # in a block, gRPC would keep a thread for it
            return handler

        def answer_once(request: object, context: grpc.ServicerContext) -> object:
            with _logged(request_id, method, streams=False):
                return serve(request, context)

        def answer_often(request: object, context: grpc.ServicerContext) -> Iterator[object]:
            # gRPC takes all answers in one thread.
            with _logged(request_id, method, streams=True):
                yield from serve(request, context)

        answer = answer_often if handler.response_streaming else answer_once
        make = getattr(grpc, f"{kind}_rpc_method_handler")
        return make(answer, handler.request_deserializer, handler.response_serializer)


@contextmanager
def _logged(request_id: str, method: str, *, streams: bool) -> Iterator[None]:
    began_s, ended = time.monotonic(), "failed"
    with request_scope(request_id):
        try:
            yield
            ended = "served"
        except GeneratorExit:
            ended = "cancelled"
            raise
        finally:
            took_s = time.monotonic() - began_s
            level = logging.INFO if took_s > SLOW_S and not streams else logging.DEBUG
            log.log(level, "%s %s in %.1f ms", method, ended, 1000 * took_s)
