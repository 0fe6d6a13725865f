"""The Storage service: a thin shell around a StorageNode."""

import threading
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NoReturn

import grpc

from kvstore_api.bulk import decode_put_request, encode_read_piece
from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_cluster.background import background_health
from kvstore_cluster.intake import MAX_TENANT_BYTES
from kvstore_cluster.leases import LEASE_ID_BYTES, LeaseId
from kvstore_cluster.listing import MAX_LISTED
from kvstore_cluster.lookup import SMALL_HEADERS_BYTES, LookupRequest
from kvstore_cluster.node import StorageNode
from kvstore_cluster.repair import RepairWorker
from kvstore_cluster.scrub import scrub
from kvstore_cluster.stored import StoredVariant
from kvstore_codec.canonical import DIGEST_BYTES
from kvstore_codec.errors import (
    AbandonedRequestError,
    BusyError,
    ChunkFormatError,
    ChunkNotFoundError,
    ConfigurationError,
    DiskError,
    FrameRangeError,
    InvalidKVError,
    StorageError,
)
from kvstore_codec.identity import ChunkId, ContentId, PrefixId
from kvstore_service.experiments import START, Experiments, Opener
from kvstore_service.grpc_puts import put_chunks
from kvstore_service.grpc_server import MAX_MESSAGE_BYTES, MAX_REPLY_BYTES, GrpcServer, parser, unary
from kvstore_service.large_requests import LargeRequests
from kvstore_service.listen import Address
from kvstore_service.lookup_reply import lookup_reply

MAX_CHUNKS = 65_536
MAX_ENCODINGS = 64
# The rest of a reply is for what else is said of MAX_CHUNKS chunks.
MAX_HEADER_BYTES = MAX_REPLY_BYTES - (16 << 20)
MAX_RANGES = 1 << 20
MAX_PIECE_BYTES = 1 << 20


class StorageService:
    """`bulk_endpoint` is the host:port of the same node's bulk port, empty where it has none; `repair` what keeps its
    chunks on their other owners, if anything does; `experiments` what limits the node, if it may be limited;
    `large` admits what takes the node long."""

    def __init__(
        self,
        node: StorageNode,
        bulk_endpoint: str = "",
        repair: RepairWorker | None = None,
        experiments: Experiments | None = None,
        large: LargeRequests | None = None,
    ) -> None:
        self._node = node
        self._large = large or LargeRequests()
        self._verifying = threading.Lock()
        self._experiments = experiments
        self._open_chunk: Opener = node.open if experiments is None else experiments.open
        self._bulk_endpoint = bulk_endpoint
        self._repair = repair

    def handlers(self) -> dict[str, grpc.RpcMethodHandler]:
        """Read and Put carry KV bytes and skip the generated message classes (kvstore_api.bulk)."""
        return {
            "Lookup": grpc.unary_unary_rpc_method_handler(
                self.lookup, parser(pb.LookupRequest, MAX_MESSAGE_BYTES), response_serializer=bytes
            ),
            "Put": grpc.stream_stream_rpc_method_handler(
                partial(put_chunks, self._node),
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
            "Throttle": unary(self.throttle, pb.ThrottleRequest),
        }

    def lookup(self, request: pb.LookupRequest, context: grpc.ServicerContext) -> bytes:
        """A serialised LookupReply: whether anybody still waits for it is looked at when it is all there, and what was
        leased for an answer that cannot be given is released."""
        # Not as ChunkIds: making a thousand of them takes longer than finding them.
        chunks = _few(request.chunks, context)
        if len(request.encodings) > MAX_ENCODINGS:
            _refuse(context, f"{len(request.encodings)} encodings in one lookup; at most {MAX_ENCODINGS}")

        def proceed(header_bytes: int) -> None:
            if not context.is_active():
                raise AbandonedRequestError("the client of a lookup has gone")
            if header_bytes > SMALL_HEADERS_BYTES:  # so will be the answer
                self._large.wait_for_turn()

        try:
            result = self._node.lookup(_lookup_request(request, chunks), proceed)
        except StorageError as error:
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
        try:
            answer = lookup_reply(chunks, result, self._bulk_endpoint)
            proceed(0)
        except BaseException as error:
            if result.lease_id is not None:
                self._node.release_lease(result.lease_id)
            if isinstance(error, InvalidKVError):
                _refuse(context, str(error))
            raise
        return answer

    def renew_lease(self, request: pb.RenewLeaseRequest, context: grpc.ServicerContext) -> pb.RenewLeaseReply:
        lease_id = _lease_id(request.lease_id, context)
        return pb.RenewLeaseReply(renewed=self._node.renew_lease(lease_id, request.lease_ms / 1000))

    def release_lease(
        self, request: pb.ReleaseLeaseRequest, context: grpc.ServicerContext
    ) -> pb.ReleaseLeaseReply:
        if request.used:
            self._use(request, context)
        return pb.ReleaseLeaseReply(released=self._node.release_lease(_lease_id(request.lease_id, context)))

    def use(self, request: pb.UseRequest, context: grpc.ServicerContext) -> pb.UseReply:
        return pb.UseReply(counted=self._use(request, context))

    def _use(self, request: pb.UseRequest | pb.ReleaseLeaseRequest, context: grpc.ServicerContext) -> bool:
        if len(request.used) > MAX_CHUNKS // 8:
            _refuse(
                context, f"{8 * len(request.used)} bits of use; a lookup has at most {MAX_CHUNKS} answers"
            )
        return self._node.use(_lease_id(request.lease_id, context), request.used, request.tokens)

    def delete(self, request: pb.DeleteRequest, context: grpc.ServicerContext) -> pb.DeleteReply:
        try:
            deleted = self._node.delete(_chunk_ids(request.chunks, context))
        except DiskError as error:
            context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
        return pb.DeleteReply(deleted=deleted)

    def report(self, request: pb.ReportRequest, context: grpc.ServicerContext) -> pb.ReportReply:
        chunks = _chunk_ids(request.chunks, context)
        scores = list(request.scores)
        if len(scores) != len(chunks) or not all(0 <= score <= 1 for score in scores):
            _refuse(context, "a report has one score from 0 to 1 for each chunk")
        self._node.report(chunks, scores)
        return pb.ReportReply()

    def list(self, request: pb.ListRequest, context: grpc.ServicerContext) -> pb.ListReply:
        if len(request.content_prefix) > DIGEST_BYTES:
            _refuse(
                context,
                f"a content_prefix has at most {DIGEST_BYTES} bytes, not {len(request.content_prefix)}",
            )
        tenant_bytes = len(request.tenant.encode())
        if tenant_bytes > MAX_TENANT_BYTES:
            _refuse(context, f"a tenant has at most {MAX_TENANT_BYTES} bytes, not {tenant_bytes}")
        self._large.wait_for_turn()  # a page may take a look at every chunk of the node
        variants, next_cursor = self._node.list(
            request.cursor,
            min(request.limit or MAX_LISTED, MAX_LISTED),
            content_prefix=request.content_prefix,
            tenant=request.tenant if request.HasField("tenant") else None,
        )
        return pb.ListReply(variants=[_variant(variant) for variant in variants], next_cursor=next_cursor)

    def verify(
        self,
        request: pb.VerifyRequest,  # noqa: ARG002
        context: grpc.ServicerContext,
    ) -> Iterator[pb.VerifyReply]:
        if not self._verifying.acquire(blocking=False):
            raise BusyError("this node is being verified already; wait until that has ended")
        try:
            yield from self._verify(context)
        finally:
            self._verifying.release()

    def _verify(self, context: grpc.ServicerContext) -> Iterator[pb.VerifyReply]:
        for progress in scrub(self._node):
            if not context.is_active():
                return
            yield pb.VerifyReply(
                checked=progress.checked,
                bytes=progress.bytes_checked,
                damaged=[
                    pb.DamagedVariant(variant=_variant(damage.variant), reason=damage.reason)
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
        )

    def throttle(self, request: pb.ThrottleRequest, context: grpc.ServicerContext) -> pb.ThrottleReply:
        if self._experiments is None:
            _refuse(
                context,
                f"{self._node.node_id} was not started for experiments and takes no limits; {START}",
                grpc.StatusCode.FAILED_PRECONDITION,
            )
        try:
            self._experiments.set_limits(request)
        except ConfigurationError as error:
            _refuse(context, str(error))
        return pb.ThrottleReply()

    def read(self, request: pb.ReadRequest, context: grpc.ServicerContext) -> Iterator[bytes]:
        """Yields serialised ReadReply messages. What is read stays in memory until its range was sent."""
        chunks = _chunk_ids(request.chunks, context)
        if len(request.encodings) != len(chunks):
            _refuse(
                context, f"{len(chunks)} chunks with {len(request.encodings)} encodings; give one for each"
            )
        if len(request.ranges) > MAX_RANGES:
            _refuse(context, f"{len(request.ranges)} ranges in one read; at most {MAX_RANGES}")
        if any(wanted.chunk >= len(chunks) for wanted in request.ranges):
            _refuse(context, f"a range names a chunk beyond the {len(chunks)} given")
        piece_bytes = min(request.piece_bytes or MAX_PIECE_BYTES, MAX_PIECE_BYTES)
        for index, wanted in enumerate(request.ranges):
            try:
                with self._open_chunk(chunks[wanted.chunk], request.encodings[wanted.chunk]) as reader:
                    for piece in reader.pieces(wanted.first_frame, wanted.frame_count, piece_bytes):
                        yield encode_read_piece(index, piece)
            except (ChunkNotFoundError, ChunkFormatError):
                yield _read_failure(index, pb.READ_STATUS_NOT_FOUND)
            except FrameRangeError:
                yield _read_failure(index, pb.READ_STATUS_INVALID_RANGE)


def _lookup_request(request: pb.LookupRequest, chunks: Sequence[pb.ChunkRef]) -> LookupRequest:
    return LookupRequest(
        chunks,
        # As a list: the message would make new strings, without a hash, for every chunk.
        list(request.encodings),
        lease_s=request.lease_ms / 1000,
        max_header_bytes=MAX_HEADER_BYTES,
        with_headers=request.with_headers,
        peek=request.peek,
        all_encodings=request.all_encodings,
        any_context=request.any_context,
        use_follows=request.use_follows,
    )


def serve_storage(
    node: StorageNode,
    *,
    host: str,
    advertise_host: str | None = None,
    bulk_endpoint: str = "",
    repair: RepairWorker | None = None,
    experiments: Experiments | None = None,
    large: LargeRequests | None = None,
) -> GrpcServer:
    """Starts the node's data endpoint on any free port of `host`. Raises AddressInUseError."""
    service = pb.DESCRIPTOR.services_by_name["Storage"].full_name
    large = large or LargeRequests()
    handlers = StorageService(node, bulk_endpoint, repair, experiments, large).handlers()
    return GrpcServer(Address(host, 0), service, handlers, advertise_host=advertise_host, large=large)


def _variant(variant: StoredVariant) -> pb.StoredVariant:
    return pb.StoredVariant(
        chunk=pb.ChunkRef(content_id=variant.chunk_id.content_id, prefix_id=variant.chunk_id.prefix_id),
        encoding=variant.encoding,
        size_bytes=variant.size_bytes,
        calibration=variant.calibration or b"",
        in_memory=variant.in_memory,
        on_disk=variant.on_disk,
        pinned=variant.pinned,
        ttl_left_s=variant.ttl_left_s,
        tenant=variant.tenant,
        cost=variant.cost,
    )


def _read_failure(index: int, status: pb.ReadStatus) -> bytes:
    message: bytes = pb.ReadReply(range=index, status=status).SerializeToString()
    return message


def _chunk_ids(chunks: Sequence[pb.ChunkRef], context: grpc.ServicerContext) -> list[ChunkId]:
    return [_chunk_id(ref, context) for ref in _few(chunks, context)]


def _few(chunks: Sequence[pb.ChunkRef], context: grpc.ServicerContext) -> list[pb.ChunkRef]:
    if len(chunks) > MAX_CHUNKS:
        _refuse(context, f"{len(chunks)} chunks in one request; at most {MAX_CHUNKS}")
    return list(chunks)


def _chunk_id(ref: pb.ChunkRef, context: grpc.ServicerContext) -> ChunkId:
    try:
        return ChunkId(ContentId(ref.content_id), PrefixId(ref.prefix_id))
    except InvalidKVError as error:
        _refuse(context, str(error))


def _lease_id(lease_id: bytes, context: grpc.ServicerContext) -> LeaseId:
    if len(lease_id) != LEASE_ID_BYTES:
        _refuse(context, f"a lease_id has {LEASE_ID_BYTES} bytes, not {len(lease_id)}")
    return LeaseId(lease_id)


def _refuse(
    context: grpc.ServicerContext, reason: str, code: grpc.StatusCode = grpc.StatusCode.INVALID_ARGUMENT
) -> NoReturn:
    context.abort(code, reason)
    raise AssertionError("abort raises")
