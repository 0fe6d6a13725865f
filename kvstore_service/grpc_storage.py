"""The Storage gRPC service, a thin shell around a StorageNode."""

from collections.abc import Iterator
from dataclasses import asdict

import grpc

from kvstore_api.bulk import decode_put_request, encode_read_piece
from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_cluster.background import background_health
from kvstore_cluster.listing import MAX_LISTED
from kvstore_cluster.lookup import SMALL_HEADERS_BYTES
from kvstore_cluster.node import StorageNode
from kvstore_cluster.repair import RepairWorker
from kvstore_cluster.scrub import scrub
from kvstore_codec.errors import (
    AbandonedRequestError,
    ChunkFormatError,
    ChunkNotFoundError,
    ConfigurationError,
    DiskError,
    FrameRangeError,
    MalformedRequestError,
    StorageError,
)
from kvstore_service import wire
from kvstore_service.chunk_source import ChunkSource
from kvstore_service.experiments import START, Experiments
from kvstore_service.grpc_puts import put_chunks
from kvstore_service.grpc_server import MAX_MESSAGE_BYTES, MAX_REPLY_BYTES, GrpcServer, parser, unary
from kvstore_service.identity import OPEN, Access
from kvstore_service.large_requests import LargeRequests
from kvstore_service.list_cursors import ListCursors
from kvstore_service.listen import Address
from kvstore_service.lookup_reply import lookup_reply
from kvstore_service.observability.process_logs import logs
from kvstore_service.tls import ServerTls
from kvstore_service.tracing import NodeTracing, traced_read, traceparent_of
from kvstore_service.verifications import Verifications

# 16 MiB of a reply are left for the other fields of wire.MAX_CHUNKS answers.
MAX_HEADER_BYTES = MAX_REPLY_BYTES - (16 << 20)
MAX_PIECE_BYTES = 1 << 20


class StorageService:
    """gRPC handlers of one storage node.

    `bulk_endpoint` is the host:port of the node's bulk port, or empty. `repair` copies the node's chunks to their other
    owners; None means no repair. `experiments` limits the node's speed; None refuses limits. `large` admits requests
    that take the node long. `access` says for which tenant a call acts. `tracing` exports spans; None exports none."""

    def __init__(
        self,
        node: StorageNode,
        bulk_endpoint: str = "",
        repair: RepairWorker | None = None,
        experiments: Experiments | None = None,
        large: LargeRequests | None = None,
        access: Access = OPEN,
        tracing: NodeTracing | None = None,
    ) -> None:
        self._node = node
        self._tracing = tracing
        self._access = access
        self._large = large or LargeRequests()
        self._verifications, self._cursors = Verifications(), ListCursors()
        self._experiments = experiments
        self._source: ChunkSource = node if experiments is None else experiments
        self._bulk_endpoint = bulk_endpoint
        self._repair = repair

    def handlers(self) -> dict[str, grpc.RpcMethodHandler]:
        """The handler of each call. Read and Put carry KV bytes, so they bypass the generated message classes
        (kvstore_api.bulk)."""
        return {
            "Lookup": grpc.unary_unary_rpc_method_handler(
                self.lookup, parser(pb.LookupRequest, MAX_MESSAGE_BYTES), response_serializer=bytes
            ),
            "Put": grpc.stream_stream_rpc_method_handler(
                self.put,
                request_deserializer=decode_put_request,
                response_serializer=pb.PutReply.SerializeToString,
            ),
            "Read": grpc.unary_stream_rpc_method_handler(
                self.read, request_deserializer=pb.ReadRequest.FromString
            ),
            "RenewLease": unary(self.renew_lease, pb.RenewLeaseRequest),
            "ReleaseLease": unary(self.release_lease, pb.ReleaseLeaseRequest),
            "Use": unary(self.use, pb.UseRequest),
            "Delete": unary(self.delete, pb.DeleteRequest, MAX_MESSAGE_BYTES),
            "Report": unary(self.report, pb.ReportRequest, MAX_MESSAGE_BYTES),
            "List": unary(self.list, pb.ListRequest),
            "Verify": grpc.unary_stream_rpc_method_handler(
                self.verify,
                request_deserializer=parser(pb.VerifyRequest),
                response_serializer=pb.VerifyReply.SerializeToString,
            ),
            "Stats": unary(self.stats, pb.StatsRequest),
            "Usage": unary(self.usage, pb.UsageRequest),
            "Logs": unary(logs, pb.LogsRequest),
            "Throttle": unary(self.throttle, pb.ThrottleRequest),
        }

    def lookup(self, request: pb.LookupRequest, context: grpc.ServicerContext) -> bytes:
        """Returns a serialised LookupReply. Checks that the client still waits, during the lookup and once the reply is
        complete. If the reply cannot be sent, its lease is released."""
        if self._tracing is None:
            return self._lookup(request, context)
        facts = {"kvstore.chunks": len(request.chunks)}
        with self._tracing.request("kvstore.node.lookup", traceparent_of(context), facts):
            return self._lookup(request, context)

    def _lookup(self, request: pb.LookupRequest, context: grpc.ServicerContext) -> bytes:
        tenant = self._tenant(request, context)
        wanted = wire.lookup_request(request, MAX_HEADER_BYTES, tenant)

        def proceed(header_bytes: int) -> None:
            if not context.is_active():
                raise AbandonedRequestError("the client disconnected during its lookup")
            if header_bytes > SMALL_HEADERS_BYTES:  # then the reply is large too
                self._large.wait_for_turn()

        try:
            result = self._node.lookup(wanted, proceed)
        except StorageError as error:
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
        try:
            answer = lookup_reply(wanted.chunks, result, self._bulk_endpoint)
            proceed(0)
        except BaseException:
            if result.lease_id is not None:
                self._node.release_lease(result.lease_id)
            raise
        return answer

    def put(
        self, steps: Iterator[pb.PutRequest | memoryview], context: grpc.ServicerContext
    ) -> Iterator[pb.PutReply]:
        return put_chunks(self._node, steps, self._access.acting(context))

    def renew_lease(self, request: pb.RenewLeaseRequest, context: grpc.ServicerContext) -> pb.RenewLeaseReply:
        lease_id, tenant = wire.lease_id(request.lease_id), self._access.tenant_or_all(context, None)
        return pb.RenewLeaseReply(renewed=self._node.renew_lease(lease_id, request.lease_ms / 1000, tenant))

    def release_lease(
        self, request: pb.ReleaseLeaseRequest, context: grpc.ServicerContext
    ) -> pb.ReleaseLeaseReply:
        lease_id, tenant = wire.lease_id(request.lease_id), self._access.tenant_or_all(context, None)
        if request.used:
            self._use(request, tenant)
        return pb.ReleaseLeaseReply(released=self._node.release_lease(lease_id, tenant))

    def use(self, request: pb.UseRequest, context: grpc.ServicerContext) -> pb.UseReply:
        return pb.UseReply(counted=self._use(request, self._access.tenant_or_all(context, None)))

    def _use(self, request: pb.UseRequest | pb.ReleaseLeaseRequest, tenant: str | None) -> bool:
        used = wire.used_bits(request)
        return self._node.use(wire.lease_id(request.lease_id), used, request.tokens, tenant)

    def delete(self, request: pb.DeleteRequest, context: grpc.ServicerContext) -> pb.DeleteReply:
        try:
            tenant = self._tenant(request, context)
            deleted = self._node.delete(wire.chunk_ids(request.chunks), tenant)
        except DiskError as error:
            context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
        return pb.DeleteReply(deleted=deleted)

    def report(self, request: pb.ReportRequest, context: grpc.ServicerContext) -> pb.ReportReply:
        chunks = wire.chunk_ids(request.chunks)
        scores = list(request.scores)
        if len(scores) != len(chunks) or not all(0 <= score <= 1 for score in scores):
            raise MalformedRequestError("a report must have one score from 0 to 1 for each chunk")
        self._node.report(chunks, scores, self._tenant(request, context))
        return pb.ReportReply()

    def list(self, request: pb.ListRequest, context: grpc.ServicerContext) -> pb.ListReply:
        content_prefix = wire.content_prefix(request)
        tenant = self._access.tenant_or_all(context, wire.tenant_or_all(request))
        own = self._access.own_tenant(context)
        self._large.wait_for_turn()  # one page may look at every chunk of the node
        variants, next_cursor = self._node.list(
            self._cursors.opened(request.cursor, own),
            min(request.limit or MAX_LISTED, MAX_LISTED),
            content_prefix=content_prefix,
            tenant=tenant,
        )
        return pb.ListReply(
            variants=map(wire.stored_variant, variants), next_cursor=self._cursors.sealed(next_cursor, own)
        )

    def verify(
        self,
        request: pb.VerifyRequest,
        context: grpc.ServicerContext,
    ) -> Iterator[pb.VerifyReply]:
        tenant = self._access.tenant_or_all(context, wire.tenant_or_all(request))
        with self._verifications.admitted(tenant):
            yield from self._verify(tenant, context)

    def _verify(self, tenant: str | None, context: grpc.ServicerContext) -> Iterator[pb.VerifyReply]:
        for progress in self._verifications.in_turns(scrub(self._node, tenant)):
            if not context.is_active():
                return
            yield pb.VerifyReply(
                checked=progress.checked,
                bytes=progress.bytes_checked,
                damaged=[
                    pb.DamagedVariant(variant=wire.stored_variant(damage.variant), reason=damage.reason)
                    for damage in progress.damaged
                ],
            )
        yield pb.VerifyReply(checked=progress.checked, bytes=progress.bytes_checked, done=True)

    def stats(self, request: pb.StatsRequest, context: grpc.ServicerContext) -> pb.StatsReply:  # noqa: ARG002
        stats = self._node.stats()
        background = background_health()
        counters = stats.counters | {"background_errors": background.errors}
        gauges = stats.gauges | {"background_failing": len(background.failing)}
        if self._repair is not None:
            counters = counters | self._repair.counters()
            gauges = gauges | self._repair.gauges(stats.chunks)
        if self._experiments is not None:
            gauges = gauges | self._experiments.gauges()
        return pb.StatsReply(
            node_id=stats.node_id,
            chunks=stats.chunks,
            bytes_used=stats.bytes_used,
            bytes_limit=stats.bytes_limit,
            leases=stats.leases,
            counters=counters,
            gauges=gauges,
            disk_error=stats.disk_error,
            samples=[
                pb.Sample(name=name, labels=labels, value=value) for name, labels, value in stats.samples
            ],
        )

    def usage(self, request: pb.UsageRequest, context: grpc.ServicerContext) -> pb.UsageReply:
        tenant = self._access.tenant_or_all(context, wire.tenant_or_all(request))
        self._large.wait_for_turn()  # looks at every chunk of the node
        found = sorted(self._node.usage(tenant).items())
        return pb.UsageReply(tenants=[pb.TenantUsage(tenant=name, **asdict(usage)) for name, usage in found])

    def throttle(self, request: pb.ThrottleRequest, context: grpc.ServicerContext) -> pb.ThrottleReply:
        if self._experiments is None:
            context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"{self._node.node_id} was not started for experiments and accepts no limits; {START}",
            )
        else:
            try:
                self._experiments.set_limits(request)
            except ConfigurationError as error:
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        return pb.ThrottleReply()

    def read(self, request: pb.ReadRequest, context: grpc.ServicerContext) -> Iterator[bytes]:
        """Yields serialised ReadReply messages. The chunk of a range stays in memory until the range is sent."""
        with traced_read(self._tracing, request, "grpc"):
            yield from self._read(request, context)

    def _read(self, request: pb.ReadRequest, context: grpc.ServicerContext) -> Iterator[bytes]:
        tenant = self._tenant(request, context)
        chunks, encodings = wire.read_targets(request)
        piece_bytes = min(request.piece_bytes or MAX_PIECE_BYTES, MAX_PIECE_BYTES)
        if request.any_order:
            with self._source.read_frames(chunks, encodings, request.ranges, tenant) as read:
                for data in read:
                    if data.failure is not None:
                        yield _read_failure(data.index, wire.range_failure(data.failure))
                    for piece in data.pieces(piece_bytes):
                        yield encode_read_piece(data.index, piece)
            return
        for index, wanted in enumerate(request.ranges):
            try:
                name, encoding = chunks[wanted.chunk], encodings[wanted.chunk]
                with self._source.open(name, encoding, tenant=tenant) as reader:
                    for piece in reader.pieces(wanted.first_frame, wanted.frame_count, piece_bytes):
                        yield encode_read_piece(index, piece)
            except (ChunkNotFoundError, ChunkFormatError):
                yield _read_failure(index, pb.READ_STATUS_NOT_FOUND)
            except FrameRangeError:
                yield _read_failure(index, pb.READ_STATUS_INVALID_RANGE)

    def _tenant(
        self,
        request: pb.LookupRequest | pb.ReadRequest | pb.DeleteRequest | pb.ReportRequest,
        context: grpc.ServicerContext,
    ) -> str:
        """The tenant that a call acts for."""
        return self._access.tenant(context, wire.tenant_name(request.tenant))


def serve_storage(
    node: StorageNode,
    *,
    host: str,
    port: int = 0,
    advertise_host: str | None = None,
    bulk_endpoint: str = "",
    repair: RepairWorker | None = None,
    experiments: Experiments | None = None,
    large: LargeRequests | None = None,
    access: Access = OPEN,
    tls: ServerTls | None = None,
    tracing: NodeTracing | None = None,
) -> GrpcServer:
    """Starts the node's gRPC server on `port` of `host`; 0 selects a free port. `large` is shared with the node's bulk
    server. Raises AddressInUseError."""
    service = pb.DESCRIPTOR.services_by_name["Storage"].full_name
    large = large or LargeRequests()
    handlers = StorageService(node, bulk_endpoint, repair, experiments, large, access, tracing).handlers()
    return GrpcServer(
        Address(host, port),
        service,
        handlers,
        advertise_host=advertise_host,
        large=large,
        access=access,
        tls=tls,
    )


def _read_failure(index: int, status: pb.ReadStatus) -> bytes:
    message: bytes = pb.ReadReply(range=index, status=status).SerializeToString()
    return message
