"""Receives the request of each call that has only one.

gRPC takes a thread for a call when its headers have come, and waits in it for the request without a limit. Whoever
sends headers alone could therefore stop a server, even a caller without a credential, who may check its health.
"""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import lru_cache, wraps
from typing import Any
from urllib.parse import unquote

import grpc

from kvstore_codec.errors import MalformedRequestError
from kvstore_service.grpc_status import reported
from kvstore_service.identity import Access, Scope
from kvstore_service.identity.caller import Caller
from kvstore_service.identity.verbs import is_open
from kvstore_service.listen import network_of
from kvstore_service.shares import Shares
from kvstore_service.stalled_streams import StalledStreams
from kvstore_service.waiting_room import WaitingRoom
from kvstore_service.wrapped_handlers import HandlerWrapper

REQUEST_S = 20.0
"""Time limit for a request to come after its headers: 8 MiB at 3.4 Mbit/s."""
MAX_RECEIVING = 256
"""Most calls of identified callers whose request has not come. It comes with the headers, unless it is large. One more
cancels another (`WaitingRoom`)."""
MAX_RECEIVING_OF_STRANGERS = 32
"""Most such calls that need no credential. gRPC keeps up to 8 MiB of the request of each."""
MAX_UNARY = 256
"""Most calls of identified callers with one request and one answer. Each has a thread until its answer is made."""
MAX_UNARY_OF_TENANT = 192
"""Of these, most of one tenant, where there are credentials."""
MAX_UNARY_OF_OPERATORS = 32
"""Most such calls of operators, storage nodes and dashboards of all tenants. They take no share of others."""
THREADS = MAX_RECEIVING + MAX_UNARY + MAX_UNARY_OF_OPERATORS
"""Most threads that calls of identified callers hold together. Calls that are refused need a further one, for a
moment."""


class UnaryRequests(HandlerWrapper):
    """Cancels a call whose request does not come within REQUEST_S, or that waits for it while too many others do, and
    refuses a call of a tenant that has too many in progress. To gRPC all calls have a stream of requests, so that a
    call is served from its headers on."""

    def __init__(self, stalled: StalledStreams, access: Access) -> None:
        super().__init__()
        self._access = access
        self._strangers = _Receiving(stalled, MAX_RECEIVING_OF_STRANGERS)
        # Threads of their own: other calls do not queue behind those of strangers.
        self._threads_of_strangers = ThreadPoolExecutor(
            MAX_RECEIVING_OF_STRANGERS + 4, "kvstore-rpc-strangers"
        )
        self._members = _Receiving(stalled, MAX_RECEIVING)
        self._calls, self._calls_of_operators = Shares("calls"), Shares("calls of operators")

    def stop(self) -> None:
        """Blocks until no call of a stranger has a thread."""
        self._threads_of_strangers.shutdown()

    def wrap(self, handler: grpc.RpcMethodHandler, method: str) -> grpc.RpcMethodHandler:
        if handler.request_streaming:
            return handler
        if handler.response_streaming:
            made = grpc.stream_stream_rpc_method_handler
            serve = self._answering_with_many(handler.unary_stream)
        else:
            made = grpc.stream_unary_rpc_method_handler
            needs_credential = not is_open(method)
            serve = self._answering_with_one(handler.unary_unary, needs_credential=needs_credential)
            if not needs_credential:  # gRPC looks for this attribute
                vars(serve)["experimental_thread_pool"] = self._threads_of_strangers
        return made(serve, handler.request_deserializer, handler.response_serializer)

    def _answering_with_one(
        self, serve: Callable[..., object], *, needs_credential: bool
    ) -> Callable[..., object]:
        def serve_if_received(requests: Iterator[object], context: grpc.ServicerContext) -> object:
            with reported(context):
                if not needs_credential:
                    return serve(self._strangers.request(requests, context, _network(context)), context)
                caller = self._caller(context)
                request = self._members.request(requests, context, _group(context, caller))
                with self._share(caller):  # calls whose request has not come take nobody's share
                    return serve(request, context)

        return serve_if_received

    def _answering_with_many(self, serve: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(serve)  # gRPC looks for attributes of the method, which say that it does not block
        def serve_if_received(
            requests: Iterator[object], context: grpc.ServicerContext, *send: Callable[..., object]
        ) -> Any:
            with reported(context):
                group = _group(context, self._caller(context))
                return serve(self._members.request(requests, context, group), context, *send)

        return serve_if_received

    def _caller(self, context: grpc.ServicerContext) -> Caller | None:
        """None where nobody is identified. Raises UnauthenticatedError."""
        return None if self._access.is_open else self._access.of_call(context)

    def _share(self, caller: Caller | None) -> AbstractContextManager[None]:
        """Counts a call while the block runs. Raises BusyError."""
        if caller is None:
            return self._calls.taken("", most=MAX_UNARY, most_of_tenant=MAX_UNARY)
        if _is_operator(caller):
            most = MAX_UNARY_OF_OPERATORS
            return self._calls_of_operators.taken("", most=most, most_of_tenant=most)
        return self._calls.taken(caller.share, most=MAX_UNARY, most_of_tenant=MAX_UNARY_OF_TENANT)


class _Receiving:
    """Calls whose request has not come, at most `most`. Thread-safe."""

    def __init__(self, stalled: StalledStreams, most: int) -> None:
        self._stalled = stalled
        self._lock = threading.Lock()
        self._room: WaitingRoom[grpc.ServicerContext] = WaitingRoom(most)

    def request(self, requests: Iterator[object], context: grpc.ServicerContext, group: str) -> object:
        """Waits for the request. Raises MalformedRequestError if the client sends none, and grpc.RpcError once the call
        is cancelled."""
        with self._lock:
            out = self._room.add(context, group)
        if out is not None:
            out.cancel()
        try:
            with self._stalled.waiting_for_message(context, REQUEST_S):
                return next(requests)
        except StopIteration:
            raise MalformedRequestError("the call has no request") from None
        finally:
            with self._lock:
                self._room.remove(context)


def _is_operator(caller: Caller) -> bool:
    """Also a storage node, and a dashboard."""
    return caller.tenant is None and Scope.DATA not in caller.scopes


def _group(context: grpc.ServicerContext, caller: Caller | None) -> str:
    """The group of a call among those that wait for their request."""
    if caller is None:
        return _network(context)
    return caller.credential_id if _is_operator(caller) else caller.share


def _network(context: grpc.ServicerContext) -> str:
    """The network of a call's client, whose address gRPC writes as ipv4:127.0.0.1:1234 or ipv6:%5B::1%5D:1234."""
    return _network_of_peer(context.peer())


@lru_cache(4096)  # about one for each connection
def _network_of_peer(peer: str) -> str:
    return network_of(unquote(peer).partition(":")[2].rpartition(":")[0].strip("[]"))
