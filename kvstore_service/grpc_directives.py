"""Coordinator service calls that direct storage nodes: pins, quotas, forgotten tenants, draining, repair."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc

from kvstore_api.chunk_refs import chunk_ref
from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_cluster.coordinator import Coordinator
from kvstore_cluster.names import MAX_TENANT_BYTES
from kvstore_codec.errors import (
    CatalogueError,
    ClusterError,
    TooManyForgettingsError,
    TooManyPinsError,
    TooManyQuotasError,
    UnknownNodeError,
)
from kvstore_service.grpc_server import MAX_MESSAGE_BYTES, unary
from kvstore_service.identity import OPEN, Access
from kvstore_service.wire import chunk_id, tenant_name

_STATUS: dict[type[ClusterError], grpc.StatusCode] = {
    CatalogueError: grpc.StatusCode.UNAVAILABLE,
    UnknownNodeError: grpc.StatusCode.NOT_FOUND,
    TooManyForgettingsError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    TooManyPinsError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    TooManyQuotasError: grpc.StatusCode.RESOURCE_EXHAUSTED,
}


class DirectiveService:
    """gRPC handlers for pins, quotas, forgotten tenants, draining and repair. `forget_more` removes what else is kept
    of a tenant; it raises CatalogueError."""

    def __init__(
        self, coordinator: Coordinator, forget_more: Callable[[str], None], access: Access = OPEN
    ) -> None:
        self._coordinator, self._forget_more, self._access = coordinator, forget_more, access

    def handlers(self) -> dict[str, grpc.RpcMethodHandler]:
        calls: list[tuple[str, Callable[..., Any], type[Any]]] = [
            ("ListPins", self.list_pins, pb.ListPinsRequest),
            ("SetQuota", self.set_quota, pb.SetQuotaRequest),
            ("ListQuotas", self.list_quotas, pb.ListQuotasRequest),
            ("ForgetTenant", self.forget_tenant, pb.ForgetTenantRequest),
            ("Drain", self.drain, pb.DrainRequest),
            ("Repair", self.repair, pb.RepairRequest),
        ]
        pin = unary(self.pin, pb.PinRequest, MAX_MESSAGE_BYTES)
        return {"Pin": pin} | {name: unary(call, request) for name, call, request in calls}

    def pin(self, request: pb.PinRequest, context: grpc.ServicerContext) -> pb.PinReply:
        chunks = [chunk_id(ref) for ref in request.chunks]
        tenant = self._access.namespace(context, tenant_name(request.tenant))
        change = self._coordinator.unpin if request.unpin else self._coordinator.pin
        with _reported(context):
            return pb.PinReply(pins=change(chunks, tenant), tenant=tenant)

    def list_pins(self, request: pb.ListPinsRequest, context: grpc.ServicerContext) -> pb.ListPinsReply:
        tenant = self._access.namespace(context, tenant_name(request.tenant))
        pins = sorted(self._coordinator.pins(tenant), key=lambda chunk: (chunk.content_id, chunk.prefix_id))
        return pb.ListPinsReply(chunks=map(chunk_ref, pins))

    def set_quota(self, request: pb.SetQuotaRequest, context: grpc.ServicerContext) -> pb.SetQuotaReply:
        _require_short("a tenant's name", request.quota.tenant, context)
        with _reported(context):
            self._coordinator.set_quota(request.quota.tenant, request.quota.limit_bytes)
        return pb.SetQuotaReply()

    def list_quotas(
        self,
        request: pb.ListQuotasRequest,  # noqa: ARG002
        context: grpc.ServicerContext,
    ) -> pb.ListQuotasReply:
        only = self._access.tenant_or_all(context, None)
        quotas = sorted(self._coordinator.quotas().items())
        return pb.ListQuotasReply(
            quotas=[
                pb.Quota(tenant=tenant, limit_bytes=limit)
                for tenant, limit in quotas
                if only in (None, tenant)
            ]
        )

    def forget_tenant(
        self, request: pb.ForgetTenantRequest, context: grpc.ServicerContext
    ) -> pb.ForgetTenantReply:
        tenant, generation = self._access.tenant(context, tenant_name(request.tenant)), request.generation
        with _reported(context):
            if not generation:
                # Without credentials, pins and canaries are those of all tenants.
                own = not self._access.is_open
                generation = self._coordinator.forget(tenant, with_pins=own)
                if own:
                    self._forget_more(tenant)
        waiting = self._coordinator.not_applied(generation)
        return pb.ForgetTenantReply(generation=generation, waiting=waiting)

    def drain(self, request: pb.DrainRequest, context: grpc.ServicerContext) -> pb.DrainReply:
        _require_short("a node_id", request.node_id, context)
        decide = self._coordinator.cancel_drain if request.cancel else self._coordinator.drain
        with _reported(context):
            decide(request.node_id)
        return pb.DrainReply()

    def repair(
        self,
        request: pb.RepairRequest,  # noqa: ARG002
        context: grpc.ServicerContext,
    ) -> pb.RepairReply:
        with _reported(context):
            return pb.RepairReply(round=self._coordinator.repair())


def _require_short(what: str, text: str, context: grpc.ServicerContext) -> None:
    if len(text.encode()) > MAX_TENANT_BYTES:
        context.abort(
            grpc.StatusCode.INVALID_ARGUMENT,
            f"{what} has {len(text.encode())} bytes; at most {MAX_TENANT_BYTES}",
        )


@contextmanager
def _reported(context: grpc.ServicerContext) -> Iterator[None]:
    """Ends the call with the gRPC status of a ClusterError that the block raises."""
    try:
        yield
    except ClusterError as error:
        context.abort(_STATUS[type(error)], str(error))
