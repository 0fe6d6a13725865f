"""Logs calls with the id of the request that they are made for."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

import grpc

from kvstore_client.request_id import METADATA_KEY, plain_id, request_scope
from kvstore_service.wrapped_handlers import HandlerWrapper, method_of

log = logging.getLogger(__name__)

SLOW_S = 1.0
"""A call that takes longer is logged as INFO, the others as DEBUG. Streams may last long."""


class RequestLog(HandlerWrapper):
    """Lines that are logged while a call is served have its request id. Logs one line for a call, however many chunks
    it names."""

    def wrap(self, handler: grpc.RpcMethodHandler, method: str) -> grpc.RpcMethodHandler:
        method = method.rpartition("/")[2]
        kind, serve = method_of(handler)
        if getattr(serve, "experimental_non_blocking", False):  # in a block, gRPC would keep a thread for it
            return handler

        def answer_once(request: object, context: grpc.ServicerContext) -> object:
            with logged(method, _request_id(context), streams=False):
                return serve(request, context)

        def answer_often(request: object, context: grpc.ServicerContext) -> Iterator[object]:
            # gRPC takes all answers in one thread.
            with logged(method, _request_id(context), streams=True):
                yield from serve(request, context)

        answer = answer_often if handler.response_streaming else answer_once
        make = getattr(grpc, f"{kind}_rpc_method_handler")
        return make(answer, handler.request_deserializer, handler.response_serializer)


@contextmanager
def logged(method: str, request_id: str, *, streams: bool) -> Iterator[None]:
    """What is logged in the block has the request's id, which may be any text. Does nothing for a call without one."""
    if not request_id:
        yield
        return
    began_s, ended = time.monotonic(), "failed"
    with request_scope(plain_id(request_id)):
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


def _request_id(context: grpc.ServicerContext) -> str:
    """Empty for a call without one."""
    named = [value for key, value in context.invocation_metadata() if key == METADATA_KEY]
    return named[0] if named and isinstance(named[0], str) else ""
