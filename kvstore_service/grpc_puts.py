"""The Put call of the Storage service."""

from collections.abc import Callable, Iterable, Iterator

from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_cluster.node import StorageNode
from kvstore_cluster.put import PendingPut
from kvstore_codec.errors import KVStoreError, MalformedRequestError, RequestError
from kvstore_service.identity.access import as_asked
from kvstore_service.wire import put_arguments, put_refusal, put_reply


def put_chunks(
    node: StorageNode,
    steps: Iterable[pb.PutRequest | memoryview],
    tenant: Callable[[str], str] = as_asked,
) -> Iterator[pb.PutReply]:
    """Stores the chunks of a Put stream. `tenant` returns the tenant of a chunk, from the one that its start names;
    its RequestErrors end the stream. Answers each chunk as soon as its result is known and skips the rest of its
    steps, so that a client can stop sending a chunk that is already stored or does not fit. Raises
    MalformedRequestError for steps in the wrong order."""
    stream = _PutStream(node, tenant)
    try:
        # `map` instead of a loop: a loop variable would keep a step of up to 8 MiB during the wait for the next one.
        yield from (reply for reply in map(stream.take, steps) if reply is not None)
    finally:
        stream.revoke()


class _PutStream:
    def __init__(self, node: StorageNode, tenant: Callable[[str], str]) -> None:
        self._node, self._tenant = node, tenant
        self._put: PendingPut | None = None
        self._inside = False  # between a start and its end or revoke

    def take(self, step: pb.PutRequest | memoryview) -> pb.PutReply | None:
        kind = "data" if isinstance(step, memoryview) else step.WhichOneof("step")
        if kind is None or self._inside == (kind == "start"):
            raise MalformedRequestError(
                f"the steps of a put are start, data..., end or revoke; got {kind or 'nothing'} in the wrong place"
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
        except RequestError:
            raise
        except KVStoreError as error:
            self.revoke()
            return put_refusal(error)
        return None

    def revoke(self) -> None:
        """Revokes the put in progress, if any."""
        put, self._put = self._put, None
        if put is not None:
            put.revoke()

    def _begin(self, start: pb.PutStart) -> pb.PutReply | None:
        self._put = self._node.begin_put(*put_arguments(start, self._tenant(start.tenant)))
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
