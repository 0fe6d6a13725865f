"""Access of repair to the other storage nodes, over gRPC at the endpoints that clients use."""

import logging
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import grpc

from kvstore_api.chunk_refs import chunk_ref
from kvstore_api.placement import Member
from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_api.v1 import kvstore_pb2_grpc as rpc
from kvstore_client.transport import GrpcTransport
from kvstore_cluster.node import StorageNode
from kvstore_cluster.repair import Outcome
from kvstore_cluster.stored import StoredVariant
from kvstore_codec.errors import ChunkNotFoundError, KVStoreError, NodeUnavailableError, TransferError
from kvstore_service.security import INSECURE, Security
from kvstore_service.wire import put_start

log = logging.getLogger(__name__)

_CALL_TIMEOUT_S = 5.0
_PIECE_BYTES = 1 << 20
_SLOWEST_BYTES_PER_S = 1 << 20
# A node that could not store durably (its disk is full, failing or absent) is asked for that again after this time.
_DURABLE_RETRY_S = 60.0
# Share of a node's capacity that repair may fill. A fuller node would evict chunks for the copies.
_FILL_LIMIT = 0.9
_CHANNEL_OPTIONS = [
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
]
_OUTCOMES = {
    pb.PUT_STATUS_STORED: Outcome.SENT,
    pb.PUT_STATUS_ALREADY_STORED: Outcome.NOT_NEEDED,
    pb.PUT_STATUS_REVOKED: Outcome.NOT_NEEDED,  # this node can no longer read the chunk, or its tenant was forgotten
    pb.PUT_STATUS_FULL: Outcome.REFUSED,
    pb.PUT_STATUS_OVER_QUOTA: Outcome.REFUSED,
    pb.PUT_STATUS_TOO_LARGE: Outcome.REFUSED,
    pb.PUT_STATUS_INVALID: Outcome.REFUSED,
    pb.PUT_STATUS_NOT_DURABLE: Outcome.REFUSED,
}


class GrpcPeers:
    """Implements `PeerNodes`. Copies are read from `node`."""

    def __init__(self, node: StorageNode, security: Security = INSECURE) -> None:
        self._node = node
        self._connector = security.connector()
        self._lock = threading.Lock()
        # By node_id: the channel, its endpoint, and the connector's changes when it was opened.
        self._channels: dict[str, tuple[grpc.Channel, tuple[str, int]]] = {}
        self._durable_again_s: dict[str, float] = {}  # by node_id: when to ask for durable copies again
        self._closed = False

    def lookup(self, member: Member, variants: Sequence[StoredVariant]) -> list[bool]:
        by_tenant: defaultdict[str, list[int]] = defaultdict(list)  # nodes with one namespace need one call
        for index, variant in enumerate(variants):
            by_tenant[variant.tenant if self._node.isolated else ""].append(index)
        having = [False] * len(variants)
        for tenant, indices in by_tenant.items():
            request = pb.LookupRequest(
                chunks=[chunk_ref(variants[index].chunk_id) for index in indices],
                encodings=[variants[0].encoding],
                peek=True,
                tenant=tenant,
            )
            reply = self._call(member, "Lookup", request)
            if len(reply.answers) != len(indices):
                raise NodeUnavailableError(
                    f"{member.node_id} returned {len(reply.answers)} answers to a lookup of {len(indices)} chunks"
                )
            for index, answer in zip(indices, reply.answers, strict=True):
                having[index] = bool(answer.encoding)
        return having

    def room_bytes(self, member: Member) -> int:
        stats = self._call(member, "Stats", pb.StatsRequest())
        on_disk = stats.gauges.get("disk_bytes_limit", 0)
        used, limit = (
            (stats.gauges["disk_bytes_used"], on_disk) if on_disk else (stats.bytes_used, stats.bytes_limit)
        )
        return max(0, int(_FILL_LIMIT * limit - used))

    def push(self, member: Member, variants: Sequence[StoredVariant]) -> list[Outcome]:
        """Copies variants to `member`. Variants on this node's disk are copied as durable puts. If `member` cannot
        store them durably, it stores them with its default durability."""
        durably = time.monotonic() >= self._durable_again_s.get(member.node_id, 0.0)
        outcomes, not_durable = self._send(member, variants, durably=durably)
        if durably and not_durable:
            self._durable_again_s[member.node_id] = time.monotonic() + _DURABLE_RETRY_S
            others, _ = self._send(member, [variants[index] for index in not_durable], durably=False)
            for index, outcome in zip(not_durable, others, strict=True):
                outcomes[index] = outcome
        return outcomes

    def _send(
        self, member: Member, variants: Sequence[StoredVariant], *, durably: bool
    ) -> tuple[list[Outcome], list[int]]:
        """The outcome of each variant, and the indices of variants that `member` could not store durably."""
        outcomes = [Outcome.FAILED] * len(variants)
        not_durable: list[int] = []
        started: list[int] = []  # indices, in the order of the replies
        size_bytes = sum(variant.size_bytes for variant in variants)
        try:
            stream = GrpcTransport(self._channel(member)).put(
                self._steps(variants, outcomes, started, durably=durably),
                _CALL_TIMEOUT_S + size_bytes / _SLOWEST_BYTES_PER_S,
            )
            try:
                for number, reply in enumerate(stream):
                    outcome = _OUTCOMES.get(reply.status, Outcome.FAILED)
                    outcomes[started[number]] = outcome
                    if reply.status == pb.PUT_STATUS_NOT_DURABLE:
                        not_durable.append(started[number])
                    elif outcome in (Outcome.REFUSED, Outcome.FAILED):
                        chunk_id = variants[started[number]].chunk_id
                        log.warning("%s refused chunk %s: %s", member.node_id, chunk_id.short, reply.message)
            finally:
                stream.cancel()
        except (NodeUnavailableError, TransferError, ValueError) as error:
            # gRPC raises ValueError if the channel was closed after _channel returned it.
            log.info("not all of %d chunks were copied to %s: %s", len(variants), member.node_id, error)
        return outcomes, not_durable

    def _steps(
        self,
        variants: Sequence[StoredVariant],
        outcomes: list[Outcome],
        started: list[int],
        *,
        durably: bool,
    ) -> Iterator[pb.PutRequest | memoryview]:
        for index, variant in enumerate(variants):
            inside = False
            copied_at = (
                self._node.forgotten_generation
            )  # before the chunk is opened: it may be forgotten then
            try:
                with self._node.open(
                    variant.chunk_id, variant.encoding, tenant=variant.tenant, peek=True
                ) as reader:
                    started.append(index)
                    inside = True
                    start = put_start(variant, durable=durably and variant.on_disk, copied_at=copied_at)
                    yield pb.PutRequest(start=start)
                    for views in reader.pieces(0, 0, _PIECE_BYTES):
                        yield from views
                    yield pb.PutRequest(end=pb.PutEnd())
            except ChunkNotFoundError:
                outcomes[index] = Outcome.NOT_NEEDED
                if inside:
                    yield pb.PutRequest(revoke=pb.PutRevoke())
            except KVStoreError as error:
                log.warning("chunk %s cannot be copied: %s", variant.chunk_id.short, error)
                if inside:
                    yield pb.PutRequest(revoke=pb.PutRevoke())

    def close(self) -> None:
        with self._lock:
            self._closed = True
            for channel, _ in self._channels.values():
                channel.close()
            self._channels.clear()

    def _call(self, member: Member, name: str, request: Any) -> Any:
        try:
            return getattr(rpc.StorageStub(self._channel(member)), name)(request, timeout=_CALL_TIMEOUT_S)
        except grpc.RpcError as error:
            raise NodeUnavailableError(
                f"{member.node_id} at {member.endpoint} does not answer ({error.code().name}: {error.details()})"
            ) from error
        except ValueError as error:  # the channel was closed after _channel returned it
            raise NodeUnavailableError(f"the channel to {member.node_id} is closed") from error

    def _channel(self, member: Member) -> grpc.Channel:
        with self._lock:
            if self._closed:
                raise NodeUnavailableError(f"the channel to {member.node_id} is closed")
            wanted = member.endpoint, self._connector.changes
            channel, opened = self._channels.get(member.node_id, (None, None))
            if channel is None or opened != wanted:
                if (
                    channel is not None
                ):  # the node has restarted at another endpoint, or there are new certificates
                    channel.close()
                channel = self._connector.channel(member.endpoint, _CHANNEL_OPTIONS)
                self._channels[member.node_id] = channel, wanted
            return channel
