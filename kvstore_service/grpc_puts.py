"""The Put call of the Storage service, and what a node says of a put on both of its ports."""

import math
from collections.abc import Iterable, Iterator

import grpc

from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_cluster.durability import Durability
from kvstore_cluster.listing import MOST_BEHIND
from kvstore_cluster.node import StorageNode
from kvstore_cluster.put import PendingPut, PutOptions
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

MAX_ENCODING_CHARACTERS = 64


def put_chunks(
    node: StorageNode,
    steps: Iterable[pb.PutRequest | memoryview],
    context: grpc.ServicerContext | None = None,  # noqa: ARG001 (of every call)
) -> Iterator[pb.PutReply]:
    """Answers a chunk as soon as its fate is known and skips the rest of its steps, so that a client may stop sending
    what is stored already or will not fit. Raises MalformedRequestError for steps out of turn."""
    stream = _PutStream(node)
    try:
        # No variable here keeps a step, of up to 8 MiB, while the next one is waited for.
        yield from (reply for reply in map(stream.take, steps) if reply is not None)
    finally:
        stream.revoke()


class _PutStream:
    def __init__(self, node: StorageNode) -> None:
        self._node = node
        self._put: PendingPut | None = None
        self._inside = False  # between a start and its end or revoke

    def take(self, step: pb.PutRequest | memoryview) -> pb.PutReply | None:
        kind = "data" if isinstance(step, memoryview) else step.WhichOneof("step")
        if kind is None or self._inside == (kind == "start"):
            raise MalformedRequestError(
                f"a put goes start, data..., end or revoke; got {kind or 'nothing'} out of turn"
            )
        self._inside = kind not in ("end", "revoke")
        try:
            if isinstance(step, memoryview):
                self._write(step)
            elif kind == "data":
                self._write(memoryview(step.data))
            elif kind == "start":
                return self._begin(step.start)
            else:
                return self._end(committed=kind == "end")
        except MalformedRequestError:
            raise
        except KVStoreError as error:
            self.revoke()
            return put_refusal(error)
        return None

    def revoke(self) -> None:
        """Ends the put that is under way, if any is."""
        put, self._put = self._put, None
        if put is not None:
            put.revoke()

    def _begin(self, start: pb.PutStart) -> pb.PutReply | None:
        try:
            self._put = begin_put(self._node, start)
        except InvalidKVError as error:
            raise MalformedRequestError(str(error)) from error
        return pb.PutReply(status=pb.PUT_STATUS_ALREADY_STORED) if self._put is None else None

    def _write(self, data: memoryview) -> None:
        if self._put is not None:
            self._put.write(data)

    def _end(self, *, committed: bool) -> pb.PutReply | None:
        put, self._put = self._put, None
        if put is None:
            return None
        if not committed:
            put.revoke()
            return pb.PutReply(status=pb.PUT_STATUS_REVOKED)
        return pb.PutReply(status=pb.PUT_STATUS_STORED if put.commit() else pb.PUT_STATUS_ALREADY_STORED)


def begin_put(node: StorageNode, start: pb.PutStart) -> PendingPut | None:
    """As StorageNode.begin_put. Raises InvalidKVError and PutStateError for a start that makes no sense, too."""
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
    return node.begin_put(
        ChunkId(ContentId(start.chunk.content_id), PrefixId(start.chunk.prefix_id)),
        start.encoding,
        start.size_bytes,
        start.calibration or None,
        PutOptions(
            Durability(start.durability),
            start.ttl_s,
            start.tenant,
            start.cost,
            start.number,
            tuple(ChunkId(ContentId(ref.content_id), PrefixId(ref.prefix_id)) for ref in start.behind),
        ),
    )


def put_refusal(error: KVStoreError) -> pb.PutReply:
    return pb.PutReply(
        status=_put_status(error), message=str(error), text_cut=isinstance(error, TextTooLongError)
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
