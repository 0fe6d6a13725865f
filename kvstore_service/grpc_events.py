"""Coordinator service call that tells a router where to subscribe to KV events."""

from typing import TYPE_CHECKING

import grpc

from kvstore_api.kv_events import topic_of
from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_service.events.keys import SubscriberKeys
from kvstore_service.grpc_server import unary
from kvstore_service.identity import Access
from kvstore_service.wire import tenant_name

if TYPE_CHECKING:  # needs pyzmq
    from kvstore_service.events.publisher import EventPublisher

NO_EVENTS = "this cluster publishes no KV events; start it with --events HOST:PORT"


class EventService:
    """gRPC handler of `Events`. `publisher` publishes them, and is None if the cluster publishes none."""

    def __init__(
        self, publisher: "EventPublisher | None", keys: SubscriberKeys | None, access: Access
    ) -> None:
        self._publisher, self._keys, self._access = publisher, keys, access

    def handlers(self) -> dict[str, grpc.RpcMethodHandler]:
        return {"Events": unary(self.events, pb.EventsRequest)}

    def events(self, request: pb.EventsRequest, context: grpc.ServicerContext) -> pb.EventsReply:
        tenant = self._access.tenant(context, tenant_name(request.tenant))
        if self._publisher is None:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, NO_EVENTS)
            raise AssertionError("abort raises")
        if self._keys is not None:
            self._keys.admit(request.curve_key, self._access.of_call(context))
        endpoint, replay_endpoint = self._publisher.addresses
        return pb.EventsReply(
            endpoint=endpoint,
            replay_endpoint=replay_endpoint,
            topic=topic_of(tenant),
            server_key=self._publisher.public_key,
        )
