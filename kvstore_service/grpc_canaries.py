"""Canary calls of the Coordinator service, a thin shell around a CanaryRegistry."""

from typing import NoReturn
from urllib.parse import unquote

import grpc

from kvstore_api.calibrations import DIGEST_BYTES
from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_cluster.canaries import CanaryRecord, CanaryRegistry, Origin, Refusals
from kvstore_codec.errors import (
    CanaryError,
    CatalogueError,
    EncryptionKeyError,
    KVStoreError,
    UnknownModelError,
)
from kvstore_service.grpc_server import MAX_MESSAGE_BYTES, unary
from kvstore_service.identity import OPEN, Access
from kvstore_service.listen import network_of
from kvstore_service.wire import tenant_name

_STATUS: dict[type[KVStoreError], grpc.StatusCode] = {
    CanaryError: grpc.StatusCode.INVALID_ARGUMENT,
    UnknownModelError: grpc.StatusCode.NOT_FOUND,
    CatalogueError: grpc.StatusCode.UNAVAILABLE,
    EncryptionKeyError: grpc.StatusCode.FAILED_PRECONDITION,  # trying again does not help
}


class CanaryService:
    def __init__(self, registry: CanaryRegistry, access: Access = OPEN) -> None:
        self._registry, self._access = registry, access
        self._refusals = Refusals()

    def handlers(self) -> dict[str, grpc.RpcMethodHandler]:
        return {
            "GetCanary": unary(self.get, pb.GetCanaryRequest),
            "PutCanary": unary(self.put, pb.PutCanaryRequest, MAX_MESSAGE_BYTES),
            "ReportRefusal": unary(self.report, pb.ReportRefusalRequest),
            "ListModels": unary(self.list, pb.ListModelsRequest),
            "ReplaceCanary": unary(self.replace, pb.ReplaceCanaryRequest),
        }

    def get(self, request: pb.GetCanaryRequest, context: grpc.ServicerContext) -> pb.CanaryReply:
        digest, tenant = _digest(request.model_digest, context), self._tenant(request, context)
        try:
            # Read before the canary, so that the caller notices a replacement between the two reads.
            changes = self._registry.changes_of(self._access.own_tenant(context))
            return _reply(*self._registry.get(digest, tenant), changes)
        except KVStoreError as error:
            _abort(error, context)

    def put(self, request: pb.PutCanaryRequest, context: grpc.ServicerContext) -> pb.CanaryReply:
        digest, origin = _digest(request.model_digest, context), _origin_of(request.origin)
        tenant = self._tenant(request, context)
        try:
            changes = self._registry.changes_of(self._access.own_tenant(context))
            client = client_of(context.peer()) if self._access.is_open else f"tenant {tenant}"
            kept = self._registry.put(digest, request.generation, origin, request.sketch, client, tenant)
            return _reply(*kept, changes)
        except KVStoreError as error:
            _abort(error, context)

    def report(
        self, request: pb.ReportRefusalRequest, context: grpc.ServicerContext
    ) -> pb.ReportRefusalReply:
        digest, tenant = _digest(request.model_digest, context), self._tenant(request, context)
        self._registry.count_use(digest, tenant)
        self._refusals.add(digest, request.generation, _origin_of(request.origin), request.message, tenant)
        return pb.ReportRefusalReply()

    def list(
        self,
        request: pb.ListModelsRequest,  # noqa: ARG002
        context: grpc.ServicerContext,
    ) -> pb.ListModelsReply:
        only = self._access.tenant_or_all(context, None)
        records = [record for record in self._registry.records() if only in (None, record.tenant)]
        return pb.ListModelsReply(models=map(self._info, records))

    def replace(
        self, request: pb.ReplaceCanaryRequest, context: grpc.ServicerContext
    ) -> pb.ReplaceCanaryReply:
        digest, tenant = _digest(request.model_digest, context), self._tenant(request, context)
        try:
            generation = self._registry.replace(digest, tenant)
        except KVStoreError as error:
            _abort(error, context)
        self._refusals.forget(digest, tenant)
        return pb.ReplaceCanaryReply(generation=generation)

    def forget_tenant(self, tenant: str) -> None:
        """Removes all canaries of a tenant, and the reports of its refused workers. Raises CatalogueError."""
        self._registry.forget_tenant(tenant)
        self._refusals.forget_tenant(tenant)

    def _tenant(
        self,
        request: pb.GetCanaryRequest
        | pb.PutCanaryRequest
        | pb.ReportRefusalRequest
        | pb.ReplaceCanaryRequest,
        context: grpc.ServicerContext,
    ) -> str:
        """The tenant whose canary a call is about."""
        return self._access.namespace(context, tenant_name(request.tenant))

    def _info(self, record: CanaryRecord) -> pb.ModelInfo:
        return pb.ModelInfo(
            model_digest=record.model_digest,
            generation=record.generation,
            origin=_origin_message(record.origin),
            created_unix_s=record.created_unix_s,
            size_bytes=record.size_bytes,
            tenant=record.tenant,
            refusals=[
                pb.Refusal(
                    origin=_origin_message(refusal.origin),
                    generation=refusal.generation,
                    message=refusal.message,
                    last_unix_s=refusal.last_unix_s,
                    times=refusal.times,
                )
                for refusal in self._refusals.of(record.model_digest, record.tenant)
            ],
        )


def client_of(peer: str) -> str:
    """The client of a call, for limits per client. For an IPv4 peer such as `ipv4:10.0.0.7:51204` it is the address
    without the port. For an IPv6 peer it is the /64 network, because one host can have all its addresses."""
    kind, _, rest = unquote(peer).partition(":")
    host = rest.rpartition(":")[0].strip("[]")
    return network_of(host) if host and kind in ("ipv4", "ipv6") else peer


def _reply(record: CanaryRecord, sketch: bytes, changes: int) -> pb.CanaryReply:
    return pb.CanaryReply(
        generation=record.generation,
        sketch=sketch,
        origin=_origin_message(record.origin),
        created_unix_s=record.created_unix_s,
        canary_changes=changes,
    )


def _origin_of(message: pb.Origin) -> Origin:
    return Origin(
        message.model_id, message.host, message.pid, message.software, message.device, message.dtype
    )


def _origin_message(origin: Origin) -> pb.Origin:
    return pb.Origin(
        model_id=origin.model_id,
        host=origin.host,
        pid=origin.pid,
        software=origin.software,
        device=origin.device,
        dtype=origin.dtype,
    )


def _digest(digest: bytes, context: grpc.ServicerContext) -> bytes:
    if len(digest) != DIGEST_BYTES:
        context.abort(
            grpc.StatusCode.INVALID_ARGUMENT, f"a digest has {DIGEST_BYTES} bytes, not {len(digest)}"
        )
    return digest


def _abort(error: KVStoreError, context: grpc.ServicerContext) -> NoReturn:
    context.abort(_STATUS[type(error)], str(error))
    raise AssertionError("abort raises")
