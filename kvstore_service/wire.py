"""Conversion between messages of the Storage service and values of the storage node, for the gRPC and the bulk port.

This module checks the requests of clients. Each function that takes a request raises MalformedRequestError for an
invalid one. Over gRPC the client then gets INVALID_ARGUMENT, and on the bulk port a refusal.
"""

import math
from collections.abc import Collection

from kvstore_api.chunk_refs import ChunkName, chunk_ref
from kvstore_api.frames import MAX_FRAME_RANGES
from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_cluster.durability import Durability
from kvstore_cluster.frame_reads import RangeDroppedError
from kvstore_cluster.leases import LEASE_ID_BYTES, LeaseId
from kvstore_cluster.listing import MOST_BEHIND
from kvstore_cluster.lookup import LookupRequest
from kvstore_cluster.names import MAX_TENANT_BYTES
from kvstore_cluster.put import PutOptions
from kvstore_cluster.stored import StoredVariant
from kvstore_codec.canonical import DIGEST_BYTES
from kvstore_codec.errors import (
    ArenaFullError,
    ChunkTooLargeError,
    ForgottenTenantError,
    FrameRangeError,
    InvalidKVError,
    KVStoreError,
    MalformedRequestError,
    NodeDrainingError,
    NotDurableError,
    OverQuotaError,
    PutStateError,
    StorageError,
    TextTooLongError,
)
from kvstore_codec.identity import ChunkId, ContentId, PrefixId

MAX_CHUNKS = 65_536
MAX_ENCODINGS = 64
MAX_ENCODING_CHARACTERS = 64
MAX_RANGES = 1 << 20
MOST_REFUSED = 4


def chunk_id(ref: ChunkName) -> ChunkId:
    try:
        return ChunkId(ContentId(ref.content_id), PrefixId(ref.prefix_id))
    except InvalidKVError as error:
        raise MalformedRequestError(
            f"a content_id and a prefix_id have {DIGEST_BYTES} bytes each, "
            f"not {len(ref.content_id)} and {len(ref.prefix_id)}"
        ) from error


def chunk_ids(refs: Collection[pb.ChunkRef]) -> list[ChunkId]:
    """The ids of at most MAX_CHUNKS chunks."""
    _require_at_most(MAX_CHUNKS, "chunks", refs)
    return [chunk_id(ref) for ref in refs]


def lease_id(sent: bytes) -> LeaseId:
    if len(sent) != LEASE_ID_BYTES:
        raise MalformedRequestError(f"a lease_id has {LEASE_ID_BYTES} bytes, not {len(sent)}")
    return LeaseId(sent)


def used_bits(request: pb.UseRequest | pb.ReleaseLeaseRequest) -> bytes:
    used: bytes = request.used
    if len(used) > MAX_CHUNKS // 8:
        raise MalformedRequestError(
            f"a request reports {8 * len(used)} used bits; a lookup has at most {MAX_CHUNKS} answers"
        )
    return used


def lookup_request(request: pb.LookupRequest, max_header_bytes: int, tenant: str) -> LookupRequest:
    """The arguments of a lookup for a tenant. The chunk references are not checked here, because converting 1,000 of
    them to ChunkIds takes longer than the lookup. `lookup_reply.py` refuses those of the wrong length."""
    _require_at_most(MAX_CHUNKS, "chunks", request.chunks)
    _require_at_most(MAX_ENCODINGS, "encodings", request.encodings)
    return LookupRequest(
        list(request.chunks),
        # A list, because the message would make new strings, without a cached hash, for every chunk.
        list(request.encodings),
        lease_s=request.lease_ms / 1000,
        max_header_bytes=max_header_bytes,
        with_headers=request.with_headers,
        peek=request.peek,
        all_encodings=request.all_encodings,
        any_context=request.any_context,
        use_follows=request.use_follows,
        tenant=tenant,
    )


def read_targets(request: pb.ReadRequest) -> tuple[list[ChunkId], list[str]]:
    """The chunks that the ranges of a read refer to, and the encoding of each."""
    _require_at_most(MAX_CHUNKS, "chunks", request.chunks)
    _require_at_most(MAX_FRAME_RANGES if request.any_order else MAX_RANGES, "ranges", request.ranges)
    if any(wanted.chunk >= len(request.chunks) for wanted in request.ranges):
        raise MalformedRequestError(
            f"a range has a chunk index beyond the {len(request.chunks)} chunks of the request"
        )
    chunks = [chunk_id(ref) for ref in request.chunks]
    encodings = list(request.encodings)
    if len(encodings) != len(chunks):
        raise MalformedRequestError(
            f"{len(chunks)} chunks with {len(encodings)} encodings; give one for each"
        )
    return chunks, encodings


def range_failure(failure: StorageError) -> pb.ReadStatus:
    """The status of a range that could not be read."""
    match failure:
        case RangeDroppedError():
            return pb.READ_STATUS_CANCELLED
        case FrameRangeError():
            return pb.READ_STATUS_INVALID_RANGE
        case _:
            return pb.READ_STATUS_NOT_FOUND


def put_arguments(start: pb.PutStart, tenant: str) -> tuple[ChunkId, str, int, bytes | None, PutOptions]:
    """The arguments of `StorageNode.begin_put` for a put of a tenant. Also raises PutStateError, for which the node
    refuses only this put."""
    if len(start.calibration) not in (0, DIGEST_BYTES):
        raise PutStateError(
            f"the calibration of a put has {DIGEST_BYTES} bytes or none; this one has {len(start.calibration)}"
        )
    if len(start.encoding) > MAX_ENCODING_CHARACTERS:
        raise PutStateError(
            f"the encoding of a put has {len(start.encoding)} characters; at most {MAX_ENCODING_CHARACTERS}"
        )
    if start.durability not in pb.Durability.values() or not 0 <= start.cost < math.inf:
        raise PutStateError(
            "the durability of a put must be a known value, and its cost finite and not negative"
        )
    if len(start.behind) > MOST_BEHIND:
        raise PutStateError(f"a put names {len(start.behind)} preceding chunks; at most {MOST_BEHIND}")
    if len(start.refused) > MOST_REFUSED or any(len(digest) != DIGEST_BYTES for digest in start.refused):
        raise PutStateError(
            f"a put names at most {MOST_REFUSED} refused headers, by digests of {DIGEST_BYTES} bytes"
        )
    options = PutOptions(
        Durability(start.durability),
        start.ttl_s,
        tenant,
        start.cost,
        start.number,
        tuple(map(chunk_id, start.behind)),
        start.copied_at if start.HasField("copied_at") else None,
        frozenset(start.refused),
    )
    return chunk_id(start.chunk), start.encoding, start.size_bytes, start.calibration or None, options


def put_start(variant: StoredVariant, *, durable: bool, copied_at: int) -> pb.PutStart:
    """The message that starts a put of a stored variant to another node. `copied_at` is the newest forgetting of a
    tenant that this node has applied."""
    return pb.PutStart(
        chunk=chunk_ref(variant.chunk_id),
        encoding=variant.encoding,
        size_bytes=variant.size_bytes,
        calibration=variant.calibration or b"",
        ttl_s=variant.ttl_left_s,
        tenant=variant.tenant,
        durability=pb.DURABILITY_DURABLE if durable else pb.DURABILITY_DEFAULT,
        cost=variant.cost,
        number=variant.number,
        behind=map(chunk_ref, variant.behind),
        copied_at=copied_at,
    )


def put_reply(*, stored: bool) -> pb.PutReply:
    """The reply to a successful put. `stored` is False if the chunk was already stored."""
    return pb.PutReply(status=pb.PUT_STATUS_STORED if stored else pb.PUT_STATUS_ALREADY_STORED)


def put_refusal(error: KVStoreError) -> pb.PutReply:
    return pb.PutReply(
        status=_put_status(error), message=str(error), text_cut=isinstance(error, TextTooLongError)
    )


def tenant_or_all(request: pb.ListRequest | pb.VerifyRequest | pb.UsageRequest) -> str | None:
    """The tenant whose chunks are listed, verified or counted. None if the request names none."""
    return tenant_name(request.tenant) if request.HasField("tenant") else None


def content_prefix(request: pb.ListRequest) -> bytes:
    prefix: bytes = request.content_prefix
    if len(prefix) > DIGEST_BYTES:
        raise MalformedRequestError(f"a content_prefix has {len(prefix)} bytes; at most {DIGEST_BYTES}")
    return prefix


def stored_variant(variant: StoredVariant) -> pb.StoredVariant:
    return pb.StoredVariant(
        chunk=chunk_ref(variant.chunk_id),
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


def tenant_name(tenant: str) -> str:
    """The name of the tenant that a request acts for. Raises MalformedRequestError for one that is too long."""
    tenant_bytes = len(tenant.encode())
    if tenant_bytes > MAX_TENANT_BYTES:
        raise MalformedRequestError(
            f"the name of a tenant has {tenant_bytes} bytes; at most {MAX_TENANT_BYTES}"
        )
    return tenant


def _put_status(error: KVStoreError) -> pb.PutStatus:
    match error:
        case ArenaFullError() | NodeDrainingError():
            return pb.PUT_STATUS_FULL
        case OverQuotaError():
            return pb.PUT_STATUS_OVER_QUOTA
        case ForgottenTenantError():
            return pb.PUT_STATUS_REVOKED
        case NotDurableError():
            return pb.PUT_STATUS_NOT_DURABLE
        case ChunkTooLargeError():
            return pb.PUT_STATUS_TOO_LARGE
        case _:
            return pb.PUT_STATUS_INVALID


def _require_at_most(limit: int, what: str, items: Collection[object]) -> None:
    if len(items) > limit:
        raise MalformedRequestError(f"a request names {len(items)} {what}; at most {limit}")
