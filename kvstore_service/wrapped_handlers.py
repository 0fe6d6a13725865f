"""The interceptors of a gRPC server that change how methods are served."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import grpc


def method_of(handler: grpc.RpcMethodHandler) -> tuple[str, Callable[..., Any]]:
    """What a handler serves calls with, and its kind: `unary_unary`, `unary_stream`, `stream_unary` or
    `stream_stream`."""
    return next(
        (kind, getattr(handler, kind))
        for kind in ("unary_unary", "unary_stream", "stream_unary", "stream_stream")
        if getattr(handler, kind) is not None
    )


class HandlerWrapper(grpc.ServerInterceptor, ABC):  # type: ignore[misc]
    """Serves each method through another handler, made at the method's first call. gRPC asks its interceptors at every
    call; making handlers took 12 % of the processor time of a lookup."""

    def __init__(self) -> None:
        self._wrapped: dict[str, tuple[grpc.RpcMethodHandler, grpc.RpcMethodHandler]] = {}
        """Handlers by method, with those made of them. Only methods that are served have any."""

    @abstractmethod
    def wrap(self, handler: grpc.RpcMethodHandler, method: str) -> grpc.RpcMethodHandler:
        """Returns the handler that serves `method`, a name like /package.Service/Method, in place of `handler`."""

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler | None],
        details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        handler = continuation(details)
        if handler is None:
            return None
        known = self._wrapped.get(details.method)
        if known is None or known[0] is not handler:
            known = self._wrapped[details.method] = (handler, self.wrap(handler, details.method))
        return known[1]
