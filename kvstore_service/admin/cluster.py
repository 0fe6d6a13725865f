"""The calls an operator needs, with their failures as one clear line each."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Self

import grpc

from kvstore_api.chunk_refs import chunk_ref
from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_api.v1 import kvstore_pb2_grpc as rpc
from kvstore_codec.errors import ServiceError
from kvstore_codec.identity import ChunkId
from kvstore_service.admin.chunk_names import ChunkPattern, unique
from kvstore_service.cluster_stats import cluster_stats
from kvstore_service.wire import chunk_id

_TIMEOUT_S = 10.0
_BATCH = 8192
_CHANNEL_OPTIONS = [("grpc.enable_http_proxy", 0), ("grpc.max_receive_message_length", 64 << 20)]


class NodeAdmin:
    """One storage node. Its calls raise ServiceError."""

    def __init__(self, member: pb.Member, channel: grpc.Channel) -> None:
        self.node_id: str = member.node_id
        self._name = f"{member.node_id} at {member.endpoint}"
        self._stub = rpc.StorageStub(channel)

    def variants(
        self, content_prefix: bytes = b"", tenant: str | None = None, page: int = 0
    ) -> Iterator[pb.StoredVariant]:
        """What is stored; asks for the next page of `page` (0: as many as the node gives) when it is needed."""
        cursor = 0
        while True:
            request = pb.ListRequest(cursor=cursor, limit=page, content_prefix=content_prefix, tenant=tenant)
            with _clear(self._name):
                reply = self._stub.List(request, timeout=_TIMEOUT_S)
            yield from reply.variants
            cursor = reply.next_cursor
            if not cursor:
                return

    def delete(self, chunks: Sequence[ChunkId]) -> int:
        """How many stored variants that were."""
        deleted = 0
        for begin in range(0, len(chunks), _BATCH):
            with _clear(self._name):
                request = pb.DeleteRequest(chunks=map(chunk_ref, chunks[begin : begin + _BATCH]))
                deleted += self._stub.Delete(request, timeout=_TIMEOUT_S).deleted
        return deleted

    def throttle(self, bandwidth_bps: float | None) -> None:
        """Limit what it sends to readers; None: no limit."""
        with _clear(self._name):
            self._stub.Throttle(pb.ThrottleRequest(bandwidth_bps=bandwidth_bps or 0), timeout=_TIMEOUT_S)

    def throttle_disk(self, read_bytes_per_s: float | None) -> None:
        """Have it read from its disk as slowly, and keep what is on disk there alone; None: no limit."""
        with _clear(self._name):
            # The other limit is said again: a node of an older version takes what is not said for none.
            limits = self._stub.Stats(pb.StatsRequest(), timeout=_TIMEOUT_S).gauges
            request = pb.ThrottleRequest(
                bandwidth_bps=limits.get("throttle_bps", 0), disk_read_Bps=read_bytes_per_s or 0
            )
            self._stub.Throttle(request, timeout=_TIMEOUT_S)

    def verify(self) -> Iterator[pb.VerifyReply]:
        """Progress until the last reply, which says `done`."""
        with _clear(self._name):
            for reply in self._stub.Verify(pb.VerifyRequest()):
                yield reply
                if reply.done:
                    return
        raise ServiceError(f"{self._name} stopped verifying before it was done; see its log")


class ClusterAdmin:
    """Context manager; entering and every call raise ServiceError, for a person to read."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._channels = ExitStack()

    def stats(self) -> pb.ClusterStatsReply:
        return cluster_stats(self._address)

    def nodes(self, only: str | None = None) -> list[NodeAdmin]:
        """The nodes that live, or just the one called `only`. At least one."""
        members = [node.member for node in self.stats().nodes if node.alive]
        if not members:
            raise ServiceError(
                "no storage node is alive; what is on their disks is there again when they are back. "
                "`kvstore status` says what is known of them"
            )
        if only is not None:
            names = ", ".join(member.node_id for member in members)
            members = [member for member in members if member.node_id == only]
            if not members:
                raise ServiceError(f"there is no live node {only!r}; those that live: {names}")
        return [NodeAdmin(member, self._channel(member.endpoint)) for member in members]

    def find(self, patterns: Sequence[ChunkPattern]) -> list[ChunkId]:
        """The chunks that are meant, as far as names are not whole among what is stored."""
        found: list[ChunkId] = []
        nodes: list[NodeAdmin] = []
        for pattern in patterns:
            if (whole := pattern.chunk_id) is not None:
                found.append(whole)
                continue
            nodes = nodes or self.nodes()
            stored = (chunk_id(v.chunk) for node in nodes for v in node.variants(pattern.content_prefix))
            found += pattern.choose(stored)
        return list(unique(found))

    def pin(self, chunks: Sequence[ChunkId]) -> int:
        """How many chunks are pinned then."""
        return self._pin(chunks, unpin=False)

    def unpin(self, chunks: Sequence[ChunkId]) -> int:
        """How many chunks are pinned then."""
        return self._pin(chunks, unpin=True)

    def pins(self) -> list[ChunkId]:
        with _clear(self._name):
            return [
                chunk_id(ref)
                for ref in self._coordinator().ListPins(pb.ListPinsRequest(), timeout=_TIMEOUT_S).chunks
            ]

    def set_quota(self, tenant: str, limit_bytes: int) -> None:
        request = pb.SetQuotaRequest(quota=pb.Quota(tenant=tenant, limit_bytes=limit_bytes))
        with _clear(self._name):
            self._coordinator().SetQuota(request, timeout=_TIMEOUT_S)

    def quotas(self) -> list[pb.Quota]:
        with _clear(self._name):
            return list(self._coordinator().ListQuotas(pb.ListQuotasRequest(), timeout=_TIMEOUT_S).quotas)

    def drain(self, node_id: str, *, cancel: bool = False) -> None:
        with _clear(self._name):
            self._coordinator().Drain(pb.DrainRequest(node_id=node_id, cancel=cancel), timeout=_TIMEOUT_S)

    def repair(self) -> int:
        """The number of the round that begins."""
        with _clear(self._name):
            return int(self._coordinator().Repair(pb.RepairRequest(), timeout=_TIMEOUT_S).round)

    def models(self) -> list[pb.ModelInfo]:
        """Those whose canary is kept, or was replaced, by their last use."""
        with _clear(self._name):
            return list(self._coordinator().ListModels(pb.ListModelsRequest(), timeout=_TIMEOUT_S).models)

    def model(self, digest: str) -> pb.ModelInfo:
        """The one whose digest begins with these hexadecimal digits."""
        models = self.models()
        found = [model for model in models if model.model_digest.hex().startswith(digest.lower())]
        if len(found) != 1 or not digest:
            names = ", ".join(model.model_digest.hex()[:12] for model in found or models) or "none"
            what = "several models begin" if len(found) > 1 else "no model begins"
            raise ServiceError(f"{what} with {digest!r}: {names}")
        return found[0]

    def replace_canary(self, model_digest: bytes) -> int:
        """The new generation."""
        request = pb.ReplaceCanaryRequest(model_digest=model_digest)
        with _clear(self._name):
            return int(self._coordinator().ReplaceCanary(request, timeout=_TIMEOUT_S).generation)

    def __enter__(self) -> Self:
        self.stats()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._channels.close()

    @property
    def _name(self) -> str:
        return f"the coordinator at {self._address}"

    def _pin(self, chunks: Sequence[ChunkId], *, unpin: bool) -> int:
        pins = 0
        for begin in range(0, len(chunks), _BATCH):
            request = pb.PinRequest(chunks=map(chunk_ref, chunks[begin : begin + _BATCH]), unpin=unpin)
            with _clear(self._name):
                pins = self._coordinator().Pin(request, timeout=_TIMEOUT_S).pins
        return pins

    def _coordinator(self) -> rpc.CoordinatorStub:
        return rpc.CoordinatorStub(self._channel(self._address))

    def _channel(self, endpoint: str) -> grpc.Channel:
        return self._channels.enter_context(grpc.insecure_channel(endpoint, _CHANNEL_OPTIONS))


@contextmanager
def _clear(name: str) -> Iterator[None]:
    try:
        yield
    except grpc.RpcError as error:
        raise ServiceError(f"{name}: {error.details()} ({error.code().name})") from error
