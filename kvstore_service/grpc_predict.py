"""Coordinator service call that predicts how long a fetch takes, for routers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import grpc

from kvstore_api.chunk_refs import chunk_ref
from kvstore_api.placement import Member, Placement
from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_api.v1 import kvstore_pb2_grpc as rpc
from kvstore_cluster.coordinator import Coordinator
from kvstore_codec.encoding import Encoding, Rate
from kvstore_codec.errors import MalformedRequestError, UnknownEncodingError
from kvstore_codec.identity import ChunkId
from kvstore_service import wire
from kvstore_service.grpc_server import MAX_MESSAGE_BYTES, unary
from kvstore_service.identity import Access

_LOOKUP_TIMEOUT_S = 1.0
DISK_Bps = 500e6
"""Rate at which a node reads from its disk, bytes per second, if it has not read enough to have measured it."""

Reply = TypeVar("Reply")


@dataclass(frozen=True, slots=True)
class _Found:
    member: Member
    encoding: str
    size_bytes: int
    on_disk: bool


class PredictService:
    """gRPC handler of `Predict`. `storage` returns the stub of a node's endpoint."""

    def __init__(
        self, coordinator: Coordinator, storage: Callable[[str], rpc.StorageStub], access: Access
    ) -> None:
        self._coordinator, self._storage, self._access = coordinator, storage, access

    def handlers(self) -> dict[str, grpc.RpcMethodHandler]:
        return {"Predict": unary(self.predict, pb.PredictRequest, MAX_MESSAGE_BYTES)}

    def predict(self, request: pb.PredictRequest, context: grpc.ServicerContext) -> pb.PredictReply:
        tenant = self._access.tenant(context, wire.tenant_name(request.tenant))
        chunks = wire.chunk_ids(request.chunks)
        if len(request.encodings) > wire.MAX_ENCODINGS:
            raise MalformedRequestError(f"a request has at most {wire.MAX_ENCODINGS} encodings")
        if not request.bandwidth_bps:
            raise MalformedRequestError("bandwidth_bps must be positive")
        found = self._find(chunks, list(request.encodings), tenant)
        leading = next((index for index in range(len(chunks)) if index not in found), len(chunks))
        parts: dict[tuple[str, str, bool], pb.PredictedPart] = {}
        for index in range(leading):
            one = found[index]
            key = one.member.node_id, one.encoding, one.on_disk
            part = parts.setdefault(
                key, pb.PredictedPart(node_id=key[0], encoding=one.encoding, on_disk=one.on_disk)
            )
            part.chunks += 1
            part.size_bytes += one.size_bytes
        size_bytes = sum(part.size_bytes for part in parts.values())
        slowest_s = max(
            [8 * size_bytes / request.bandwidth_bps, *self._node_seconds(list(parts.values()), found)]
        )
        return pb.PredictReply(
            chunks=leading,
            size_bytes=size_bytes,
            seconds=request.latency_us / 1e6 + slowest_s if leading else 0.0,
            parts=parts.values(),
        )

    def _node_seconds(self, parts: Sequence[pb.PredictedPart], found: dict[int, _Found]) -> list[float]:
        """Seconds that each node needs to read its chunks from disk, and to send them, if its rate is limited."""
        members = {one.member.node_id: one.member for one in found.values()}
        calls = {
            node_id: self._storage(members[node_id].endpoint).Stats.future(
                pb.StatsRequest(), timeout=_LOOKUP_TIMEOUT_S
            )
            for node_id in {part.node_id for part in parts}
        }
        seconds: list[float] = []
        for node_id, call in calls.items():
            own = [part for part in parts if part.node_id == node_id]
            gauges = _result(call, pb.StatsReply()).gauges
            from_disk = sum(part.size_bytes for part in own if part.on_disk)
            disk_rates = [gauges[name] for name in ("disk_read_Bps", "disk_throttle_Bps") if gauges.get(name)]
            seconds.append(from_disk / min(disk_rates, default=DISK_Bps))
            if limit_bps := gauges.get("throttle_bps"):
                seconds.append(8 * sum(part.size_bytes for part in own) / limit_bps)
        return seconds

    def _find(self, chunks: Sequence[ChunkId], encodings: list[str], tenant: str) -> dict[int, _Found]:
        """The chunks that are stored, by index: each at its best reader, or else at any other."""
        membership = self._coordinator.membership()
        placement = Placement(membership.members, membership.replicas)
        readers = placement.readers([chunk.content_id for chunk in chunks])
        found: dict[int, _Found] = {}
        self._ask({index: of[:1] for index, of in enumerate(readers)}, chunks, encodings, tenant, found)
        others = {index: of[1:] for index, of in enumerate(readers) if index not in found}
        self._ask(others, chunks, encodings, tenant, found)
        return found

    def _ask(
        self,
        readers: dict[int, tuple[Member, ...]],
        chunks: Sequence[ChunkId],
        encodings: list[str],
        tenant: str,
        found: dict[int, _Found],
    ) -> None:
        asked: dict[Member, list[int]] = {}
        for index, of in readers.items():
            for member in of:
                asked.setdefault(member, []).append(index)
        calls = [
            (
                member,
                indices,
                self._storage(member.endpoint).Lookup.future(
                    pb.LookupRequest(
                        chunks=[chunk_ref(chunks[index]) for index in indices],
                        encodings=encodings,
                        all_encodings=not encodings,
                        peek=True,
                        tenant=tenant,
                    ),
                    timeout=_LOOKUP_TIMEOUT_S,
                ),
            )
            for member, indices in asked.items()
        ]
        for member, indices, call in calls:
            for index, answer in zip(indices, _result(call, pb.LookupReply()).answers, strict=False):
                usable = _usable(answer, encodings)
                if usable is not None and index not in found:
                    found[index] = _Found(member, *usable)


def _usable(answer: pb.LookupAnswer, encodings: list[str]) -> tuple[str, int, bool] | None:
    """Encoding, size and tier in which a chunk would be read: the node's first choice among `encodings`, or without
    them its first exact one."""
    variants: list[pb.LookupAnswer | pb.OtherEncoding] = [answer, *answer.others]
    for variant in variants:
        if variant.encoding and (encodings or _is_exact(variant.encoding)):
            return variant.encoding, variant.size_bytes, variant.on_disk
    return None


def _is_exact(encoding: str) -> bool:
    try:
        return Encoding.parse(encoding).rate is Rate.EXACT
    except UnknownEncodingError:
        return False


def _result(call: grpc.Future, otherwise: Reply) -> Reply:
    """The reply. `otherwise` if the node does not answer: then nothing is known of it."""
    try:
        reply: Reply = call.result()
    except grpc.RpcError:
        return otherwise
    return reply
