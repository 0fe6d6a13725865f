"""The Put call of the Storage service."""

from collections.abc import Iterable, Iterator

import grpc

from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_cluster.node import StorageNode
from kvstore_cluster.put import PendingPut
from kvstore_codec.errors import KVStoreError, MalformedRequestError
from kvstore_service.wire import put_arguments, put_refusal, put_reply


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
        self._put = self._node.begin_put(*put_arguments(start))
        return put_reply(stored=False) if self._put is None else None

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
        return put_reply(stored=put.commit())
