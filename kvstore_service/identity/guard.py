"""The check of every gRPC call before its request is received."""

from collections.abc import Callable
from functools import wraps
from typing import NoReturn

import grpc

from kvstore_codec.errors import RequestError, UnauthenticatedError
from kvstore_service.identity.access import NO_CREDENTIAL, Access, bearer_token
from kvstore_service.identity.verbs import VERBS, Verb, is_open
from kvstore_service.wrapped_handlers import method_of


class Guard(grpc.ServerInterceptor):  # type: ignore[misc]
    """Refuses calls whose caller is not identified, or lacks what `VERBS` says. It must be the first interceptor: a
    call that it refuses takes no memory for its request, and no share of what the others limit.

    Which chunks a permitted call may touch is decided where it is served, by the tenant of its caller."""

    def __init__(self, access: Access) -> None:
        self._access = access

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler | None],
        details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        if is_open(details.method):
            return continuation(details)
        verb = VERBS.get(details.method)
        try:
            token = bearer_token(details.invocation_metadata)
            if token is not None:
                caller = self._access.of_token(token)
                if verb is None:
                    return None  # UNIMPLEMENTED, also where it is served: nothing says who may call it
                verb.require(caller)
                return continuation(details)
            if not self._access.knows_certificates:
                raise UnauthenticatedError(NO_CREDENTIAL)
        except RequestError as error:
            return _refusing(error)
        handler = continuation(details)
        return None if handler is None or verb is None else self._by_certificate(handler, verb)

    def _by_certificate(self, handler: grpc.RpcMethodHandler, verb: Verb) -> grpc.RpcMethodHandler:
        """Checks the certificate of the caller, which is known only once the call is served."""
        kind, serve = method_of(handler)

        @wraps(serve)
        def checked(request: object, context: grpc.ServicerContext, *send: Callable[..., object]) -> object:
            try:
                verb.require(self._access.of_call(context))
            except RequestError as error:
                _abort(error, context)
            return serve(request, context, *send)

        make = getattr(grpc, f"{kind}_rpc_method_handler")
        return make(checked, handler.request_deserializer, handler.response_serializer)


def _refusing(error: RequestError) -> grpc.RpcMethodHandler:
    """A handler that refuses any kind of call, and does not receive its request."""
    return grpc.stream_stream_rpc_method_handler(lambda _, context: _abort(error, context))


def _abort(error: RequestError, context: grpc.ServicerContext) -> NoReturn:
    unauthenticated = isinstance(error, UnauthenticatedError)
    context.abort(
        grpc.StatusCode.UNAUTHENTICATED if unauthenticated else grpc.StatusCode.PERMISSION_DENIED, str(error)
    )
    raise AssertionError("abort raises")
