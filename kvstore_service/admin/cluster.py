"""Administrative calls to the coordinator and the storage nodes. Failures are one-line ServiceErrors."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Self, TypeAlias

import grpc

from kvstore_api.chunk_refs import chunk_ref
from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_api.v1 import kvstore_pb2_grpc as rpc
from kvstore_codec.errors import ServiceError
from kvstore_codec.identity import ChunkId
from kvstore_service.admin.chunk_names import ChunkPattern
from kvstore_service.cluster_stats import SERVE, cluster_stats, environment_connector, live_members
from kvstore_service.wire import chunk_id

_TIMEOUT_S = 10.0
_USAGE_TIMEOUT_S = 60.0  # a node looks at all of its chunks
_BATCH = 8192
USAGE_COUNTS = ("chunks", "bytes", "memory_chunks", "memory_bytes", "disk_chunks", "disk_bytes")
"""Numbers of a TenantUsage."""
_CHANNEL_OPTIONS = [("grpc.max_receive_message_length", 64 << 20)]


ChunksByTenant: TypeAlias = Mapping[str, Sequence[ChunkId]]
"""Chunks that a command acts on. Without credentials a chunk's tenant only says whose quota it counts against."""


class NodeAdmin:
    """Administrative calls to one storage node. They raise ServiceError."""

    def __init__(self, member: pb.Member, channel: grpc.Channel) -> None:
        self.node_id: str = member.node_id
        self._name = f"{member.node_id} at {member.endpoint}"
        self._stub = rpc.StorageStub(channel)

    def variants(
        self, content_prefix: bytes = b"", tenant: str | None = None, page: int = 0
    ) -> Iterator[pb.StoredVariant]:
        """Stored variants of chunks on the node. Requests them lazily, `page` variants at a time (0: the node's own
        page size)."""
        cursor = 0
        while True:
            request = pb.ListRequest(cursor=cursor, limit=page, content_prefix=content_prefix, tenant=tenant)
            with _service_errors(self._name):
                reply = self._stub.List(request, timeout=_TIMEOUT_S)
            yield from reply.variants
            cursor = reply.next_cursor
            if not cursor:
                return

    def delete(self, chunks: Sequence[ChunkId], tenant: str = "") -> int:
        """Deletes chunks of a tenant in all encodings, and returns the number of deleted variants."""
        deleted = 0
        for begin in range(0, len(chunks), _BATCH):
            with _service_errors(self._name):
                batch = map(chunk_ref, chunks[begin : begin + _BATCH])
                request = pb.DeleteRequest(chunks=batch, tenant=tenant)
                deleted += self._stub.Delete(request, timeout=_TIMEOUT_S).deleted
        return deleted

    def usage(self, tenant: str | None) -> list[pb.TenantUsage]:
        """What each tenant stores on the node, or one tenant."""
        with _service_errors(self._name):
            return list(self._stub.Usage(pb.UsageRequest(tenant=tenant), timeout=_USAGE_TIMEOUT_S).tenants)

    def throttle(self, bandwidth_bps: float | None) -> None:
        """Limits the bandwidth at which the node sends to readers. None removes the limit."""
        with _service_errors(self._name):
            self._stub.Throttle(pb.ThrottleRequest(bandwidth_bps=bandwidth_bps or 0), timeout=_TIMEOUT_S)

    def throttle_disk(self, read_bytes_per_s: float | None) -> None:
        """Limits the rate at which the node reads its disk. Under the limit, chunks on disk are not kept in memory.
        None removes the limit."""
        with _service_errors(self._name):
            # The request repeats the bandwidth limit, because an older node removes a limit that is not given.
            limits = self._stub.Stats(pb.StatsRequest(), timeout=_TIMEOUT_S).gauges
            request = pb.ThrottleRequest(
                bandwidth_bps=limits.get("throttle_bps", 0), disk_read_Bps=read_bytes_per_s or 0
            )
            self._stub.Throttle(request, timeout=_TIMEOUT_S)

    def verify(self) -> Iterator[pb.VerifyReply]:
        """Verifies all chunks on the node that the caller may see, and yields its progress. The last reply has `done`
        set."""
        with _service_errors(self._name):
            for reply in self._stub.Verify(pb.VerifyRequest()):
                yield reply
                if reply.done:
                    return
        raise ServiceError(f"{self._name} stopped before all chunks were verified; see its log")


class ClusterAdmin:
    """Administrative calls to a cluster. A context manager; entering it and every call raise ServiceError."""

    def __init__(self, address: str, *, start: str = SERVE) -> None:
        """`start` is the command that errors advise when no cluster answers."""
        self._address, self._start = address, start
        self._connector = environment_connector()
        self._channels = ExitStack()

    def stats(self) -> pb.ClusterStatsReply:
        return cluster_stats(self._address, start=self._start, connector=self._connector)

    def nodes(self, only: str | None = None) -> list[NodeAdmin]:
        """All live nodes, or only the one with id `only`. Raises ServiceError if there is none."""
        members = live_members(self._address, start=self._start, connector=self._connector)
        if not members:
            raise ServiceError(
                "no storage node is alive; chunks on their disks are available again when the nodes are back. "
                "`kvstore status` shows why they are down"
            )
        if only is not None:
            names = ", ".join(member.node_id for member in members)
            members = [member for member in members if member.node_id == only]
            if not members:
                raise ServiceError(f"there is no live node {only!r}; live nodes: {names}")
        return [NodeAdmin(member, self._channel(member.endpoint)) for member in members]

    def find(self, patterns: Sequence[ChunkPattern], tenant: str | None = None) -> ChunksByTenant:
        """Chunks that the patterns name, of one tenant or of all. Abbreviated names are looked up among the stored
        chunks; a complete name without a tenant is that of a chunk of the default tenant."""
        found: defaultdict[str, dict[ChunkId, None]] = defaultdict(dict)
        nodes: list[NodeAdmin] = []
        for pattern in patterns:
            if (whole := pattern.chunk_id) is not None:
                found[tenant or ""][whole] = None
                continue
            nodes = nodes or self.nodes()
            owners: defaultdict[ChunkId, set[str]] = defaultdict(set)
            for node in nodes:
                for variant in node.variants(pattern.content_prefix, tenant):
                    owners[chunk_id(variant.chunk)].add(variant.tenant)
            for chunk in pattern.choose(owners):
                for owner in owners[chunk]:
                    found[owner][chunk] = None
        return {owner: list(chunks) for owner, chunks in found.items()}

    def pin(self, chunks: ChunksByTenant) -> int:
        """Pins chunks, and returns the number of pinned chunks of these tenants."""
        return self._pin(chunks, unpin=False)

    def unpin(self, chunks: ChunksByTenant) -> int:
        """Unpins chunks, and returns the number of chunks of these tenants that are still pinned."""
        return self._pin(chunks, unpin=True)

    def pins(self, tenant: str = "") -> list[ChunkId]:
        """Pinned chunks of a tenant. Without credentials all pins are the default tenant's."""
        request = pb.ListPinsRequest(tenant=tenant)
        with _service_errors(self._name):
            return [chunk_id(ref) for ref in self._coordinator().ListPins(request, timeout=_TIMEOUT_S).chunks]

    def set_quota(self, tenant: str, limit_bytes: int) -> None:
        request = pb.SetQuotaRequest(quota=pb.Quota(tenant=tenant, limit_bytes=limit_bytes))
        with _service_errors(self._name):
            self._coordinator().SetQuota(request, timeout=_TIMEOUT_S)

    def quotas(self) -> list[pb.Quota]:
        with _service_errors(self._name):
            return list(self._coordinator().ListQuotas(pb.ListQuotasRequest(), timeout=_TIMEOUT_S).quotas)

    def usage(self, tenant: str | None = None) -> list[pb.TenantUsage]:
        """What each tenant stores on all live nodes together, or one tenant."""
        totals: dict[str, pb.TenantUsage] = {}
        for node in self.nodes():
            for found in node.usage(tenant):
                total = totals.setdefault(found.tenant, pb.TenantUsage(tenant=found.tenant))
                for name in USAGE_COUNTS:
                    setattr(total, name, getattr(total, name) + getattr(found, name))
        return list(totals.values())

    def forget_tenant(self, tenant: str, generation: int = 0) -> tuple[int, list[str]]:
        """Lets all nodes remove a tenant's chunks; with `generation`, only asks how far that is. Returns the
        generation, and the ids of known nodes that have not done it yet."""
        request = pb.ForgetTenantRequest(tenant=tenant, generation=generation)
        with _service_errors(self._name):
            reply = self._coordinator().ForgetTenant(request, timeout=_TIMEOUT_S)
        return reply.generation, list(reply.waiting)

    def live_node_ids(self) -> set[str]:
        members = live_members(self._address, start=self._start, connector=self._connector)
        return {member.node_id for member in members}

    def drain(self, node_id: str, *, cancel: bool = False) -> None:
        with _service_errors(self._name):
            self._coordinator().Drain(pb.DrainRequest(node_id=node_id, cancel=cancel), timeout=_TIMEOUT_S)

    def repair(self) -> int:
        """Starts a round of repair, and returns its number."""
        with _service_errors(self._name):
            return int(self._coordinator().Repair(pb.RepairRequest(), timeout=_TIMEOUT_S).round)

    def models(self) -> list[pb.ModelInfo]:
        """Models with a stored or replaced canary, ordered by last use."""
        with _service_errors(self._name):
            return list(self._coordinator().ListModels(pb.ListModelsRequest(), timeout=_TIMEOUT_S).models)

    def model(self, digest: str, tenant: str | None = None) -> pb.ModelInfo:
        """The model whose digest begins with the hexadecimal digits `digest`, of one tenant or of all."""
        models = [model for model in self.models() if tenant in (None, model.tenant)]
        found = [model for model in models if model.model_digest.hex().startswith(digest.lower())]
        if len(found) != 1 or not digest:
            if not models:
                raise ServiceError(
                    f"no model has a digest that begins with {digest!r}: the cluster has no models"
                )
            names = ", ".join(
                model.model_digest.hex()[:12] + (f" of tenant {model.tenant}" if model.tenant else "")
                for model in found or models
            )
            what = "several models have" if len(found) > 1 else "no model has"
            raise ServiceError(f"{what} a digest that begins with {digest!r}: {names}")
        return found[0]

    def replace_canary(self, model_digest: bytes, tenant: str = "") -> int:
        """Discards a tenant's canary of the model, and returns the new generation."""
        request = pb.ReplaceCanaryRequest(model_digest=model_digest, tenant=tenant)
        with _service_errors(self._name):
            return int(self._coordinator().ReplaceCanary(request, timeout=_TIMEOUT_S).generation)

    def __enter__(self) -> Self:
        live_members(self._address, start=self._start, connector=self._connector)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._channels.close()

    @property
    def _name(self) -> str:
        return f"the coordinator at {self._address}"

    def _pin(self, chunks: ChunksByTenant, *, unpin: bool) -> int:
        pins: dict[str, int] = {}
        for tenant, named in chunks.items():
            for begin in range(0, len(named), _BATCH):
                batch = map(chunk_ref, named[begin : begin + _BATCH])
                request = pb.PinRequest(chunks=batch, unpin=unpin, tenant=tenant)
                with _service_errors(self._name):
                    reply = self._coordinator().Pin(request, timeout=_TIMEOUT_S)
                pins[reply.tenant] = reply.pins
        return sum(pins.values())

    def _coordinator(self) -> rpc.CoordinatorStub:
        return rpc.CoordinatorStub(self._channel(self._address))

    def _channel(self, endpoint: str) -> grpc.Channel:
        return self._channels.enter_context(self._connector.channel(endpoint, _CHANNEL_OPTIONS))


@contextmanager
def _service_errors(name: str) -> Iterator[None]:
    """Turns a gRPC error of the block into a ServiceError that names the process `name`."""
    try:
        yield
    except grpc.RpcError as error:
        raise ServiceError(f"{name}: {error.details()} ({error.code().name})") from error
