"""Messages of the Storage service as values of the storage node, and the other way round, for both of its ports.

What a client sent is checked here. Each function that takes a request raises MalformedRequestError for one that makes
no sense: INVALID_ARGUMENT over gRPC, a refusal on the bulk port.
"""

import math
from collections.abc import Collection

from kvstore_api.chunk_refs import ChunkName, chunk_ref
from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_cluster.durability import Durability
from kvstore_cluster.intake import MAX_TENANT_BYTES
from kvstore_cluster.leases import LEASE_ID_BYTES, LeaseId
from kvstore_cluster.listing import MOST_BEHIND
from kvstore_cluster.lookup import LookupRequest
from kvstore_cluster.put import PutOptions
from kvstore_cluster.stored import StoredVariant
from kvstore_codec.canonical import DIGEST_BYTES
from kvstore_codec.errors import (
    ArenaFullError,
    ChunkTooLargeError,
    InvalidKVError,
    KVStoreError,
    MalformedRequestError,
    NodeDrainingError,
    NotDurableError,
    OverQuotaError,
    PutStateError,
    TextTooLongError,
)
from kvstore_codec.identity import ChunkId, ContentId, PrefixId

MAX_CHUNKS = 65_536
MAX_ENCODINGS = 64
MAX_ENCODING_CHARACTERS = 64
MAX_RANGES = 1 << 20


def chunk_id(ref: ChunkName) -> ChunkId:
    try:
        return ChunkId(ContentId(ref.content_id), PrefixId(ref.prefix_id))
    except InvalidKVError as error:
        raise MalformedRequestError(
            f"content_id and prefix_id have {DIGEST_BYTES} bytes each, "
            f"not {len(ref.content_id)} and {len(ref.prefix_id)}"
        ) from error


def chunk_ids(refs: Collection[pb.ChunkRef]) -> list[ChunkId]:
    """At most MAX_CHUNKS."""
    _require_at_most(MAX_CHUNKS, "chunks", refs)
    return [chunk_id(ref) for ref in refs]


def lease_id(sent: bytes) -> LeaseId:
    if len(sent) != LEASE_ID_BYTES:
        raise MalformedRequestError(f"a lease_id has {LEASE_ID_BYTES} bytes, not {len(sent)}")
    return LeaseId(sent)


def used_bits(request: pb.UseRequest | pb.ReleaseLeaseRequest) -> bytes:
    used: bytes = request.used
    if len(used) > MAX_CHUNKS // 8:
        raise MalformedRequestError(f"{8 * len(used)} bits of use; a lookup has at most {MAX_CHUNKS} answers")
    return used


def lookup_request(request: pb.LookupRequest, max_header_bytes: int) -> LookupRequest:
    """Its chunks are as they were sent: `lookup_reply.py` refuses those that name none. To make a thousand ChunkIds
    takes longer than to find them."""
    _require_at_most(MAX_CHUNKS, "chunks", request.chunks)
    _require_at_most(MAX_ENCODINGS, "encodings", request.encodings)
    return LookupRequest(
        list(request.chunks),
        # As a list: the message would make new strings, without a hash, for every chunk.
        list(request.encodings),
        lease_s=request.lease_ms / 1000,
        max_header_bytes=max_header_bytes,
        with_headers=request.with_headers,
        peek=request.peek,
        all_encodings=request.all_encodings,
        any_context=request.any_context,
        use_follows=request.use_follows,
    )


def read_targets(request: pb.ReadRequest) -> tuple[list[ChunkId], list[str]]:
    """The chunks that the ranges of a read refer to, with the encoding of each. Whether a range refers to one of them
    is not checked."""
    _require_at_most(MAX_CHUNKS, "chunks", request.chunks)
    _require_at_most(MAX_RANGES, "ranges", request.ranges)
    chunks = [chunk_id(ref) for ref in request.chunks]
    encodings = list(request.encodings)
    if len(encodings) != len(chunks):
        raise MalformedRequestError(
            f"{len(chunks)} chunks with {len(encodings)} encodings; give one for each"
        )
    return chunks, encodings


def put_arguments(start: pb.PutStart) -> tuple[ChunkId, str, int, bytes | None, PutOptions]:
    """What `StorageNode.begin_put` takes. Raises PutStateError, too: then the node refuses this put alone."""
    if len(start.calibration) not in (0, DIGEST_BYTES):
        raise PutStateError(
            f"a put's calibration is a digest of {DIGEST_BYTES} bytes, or empty; {len(start.calibration)} bytes came"
        )
    if len(start.encoding) > MAX_ENCODING_CHARACTERS:
        raise PutStateError(
            f"a put's encoding has a name of {len(start.encoding)} characters; at most {MAX_ENCODING_CHARACTERS}"
        )
    if start.durability not in pb.Durability.values() or not 0 <= start.cost < math.inf:
        raise PutStateError("a put's durability is one of the known ones, and its cost is not negative")
    if len(start.behind) > MOST_BEHIND:
        raise PutStateError(f"a put names at most {MOST_BEHIND} chunks before it, not {len(start.behind)}")
    options = PutOptions(
        Durability(start.durability),
        start.ttl_s,
        start.tenant,
        start.cost,
        start.number,
        tuple(map(chunk_id, start.behind)),
    )
    return chunk_id(start.chunk), start.encoding, start.size_bytes, start.calibration or None, options


def put_start(variant: StoredVariant, *, durable: bool) -> pb.PutStart:
    """Announces a stored variant to another node."""
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
    )


def put_reply(*, stored: bool) -> pb.PutReply:
    """The chunk is there: by this put, or it was before."""
    return pb.PutReply(status=pb.PUT_STATUS_STORED if stored else pb.PUT_STATUS_ALREADY_STORED)


def put_refusal(error: KVStoreError) -> pb.PutReply:
    return pb.PutReply(
        status=_put_status(error), message=str(error), text_cut=isinstance(error, TextTooLongError)
    )


def tenant_of(request: pb.ListRequest) -> str | None:
    """Whose chunks are to be listed; None: everybody's."""
    tenant_bytes = len(request.tenant.encode())
    if tenant_bytes > MAX_TENANT_BYTES:
        raise MalformedRequestError(f"a tenant has at most {MAX_TENANT_BYTES} bytes, not {tenant_bytes}")
    return request.tenant if request.HasField("tenant") else None


def content_prefix(request: pb.ListRequest) -> bytes:
    prefix: bytes = request.content_prefix
    if len(prefix) > DIGEST_BYTES:
        raise MalformedRequestError(f"a content_prefix has at most {DIGEST_BYTES} bytes, not {len(prefix)}")
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


def _put_status(error: KVStoreError) -> pb.PutStatus:
    match error:
        case ArenaFullError() | NodeDrainingError():
            return pb.PUT_STATUS_FULL
        case OverQuotaError():
            return pb.PUT_STATUS_OVER_QUOTA
        case NotDurableError():
            return pb.PUT_STATUS_NOT_DURABLE
        case ChunkTooLargeError():
            return pb.PUT_STATUS_TOO_LARGE
        case _:
            return pb.PUT_STATUS_INVALID


def _require_at_most(limit: int, what: str, items: Collection[object]) -> None:
    if len(items) > limit:
        raise MalformedRequestError(f"{len(items)} {what} in one request; at most {limit}")
