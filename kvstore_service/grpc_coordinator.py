"""The Coordinator gRPC service, a thin shell around a Coordinator, its failure detector and the registries."""

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import grpc

from kvstore_api.placement import Member
from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_api.v1 import kvstore_pb2_grpc as rpc
from kvstore_client.connector import Connector
from kvstore_cluster.calibrations import CalibrationRegistry
from kvstore_cluster.canaries import CanaryRegistry
from kvstore_cluster.catalogue import NodeRecord
from kvstore_cluster.coordinator import Coordinator
from kvstore_cluster.events.hub import EventHub
from kvstore_cluster.failure_detector import FailureDetector
from kvstore_codec.errors import AddressInUseError
from kvstore_service.events.keys import SubscriberKeys
from kvstore_service.grpc_calibrations import CalibrationService
from kvstore_service.grpc_canaries import CanaryService
from kvstore_service.grpc_directives import DirectiveService
from kvstore_service.grpc_events import EventService
from kvstore_service.grpc_predict import PredictService
from kvstore_service.grpc_server import GrpcServer, unary
from kvstore_service.identity import OPEN, Access
from kvstore_service.listen import Address
from kvstore_service.observability.fetch_log import FetchLog
from kvstore_service.observability.process_logs import logs
from kvstore_service.security import INSECURE, Security

if TYPE_CHECKING:
    from kvstore_service.events.publisher import EventPublisher

_PROBE_TIMEOUT_S = 1.0
_CHANNEL_OPTIONS = [
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
]


class StorageProbe:
    """Asks storage nodes for their stats at the endpoints that clients use. Keeps a channel to each. Thread-safe."""

    def __init__(self, connector: Connector) -> None:
        self._connector = connector
        self._lock = threading.Lock()
        self._changes = connector.changes  # when the channels were opened
        self._channels: dict[str, grpc.Channel] = {}
        self._retired: list[grpc.Channel] = []

    def stats(self, members: Sequence[Member]) -> list[pb.StatsReply | str]:
        """Stats of each node, or the reason why it did not answer. Asks all nodes at the same time; blocks for at most
        _PROBE_TIMEOUT_S."""
        calls = [
            self.stub(member.endpoint).Stats.future(pb.StatsRequest(), timeout=_PROBE_TIMEOUT_S)
            for member in members
        ]
        return [_answer(member, call) for member, call in zip(members, calls, strict=True)]

    def failures(self, members: Sequence[Member]) -> list[str | None]:
        """For each node None if it answers, or the reason why it did not. Closes the channels of all other nodes."""
        with self._lock:
            for endpoint in self._channels.keys() - {member.endpoint for member in members}:
                self._channels.pop(endpoint).close()
        return [answer if isinstance(answer, str) else None for answer in self.stats(members)]

    def close(self) -> None:
        self.failures([])
        for channel in self._retired:
            channel.close()

    def stub(self, endpoint: str) -> rpc.StorageStub:
        """The stub of a node's endpoint."""
        with self._lock:
            if self._changes != (changes := self._connector.changes):
                self._changes = changes
                for channel in self._retired:
                    channel.close()
                # Another thread may wait for an answer on these.
                self._retired = list(self._channels.values())
                self._channels.clear()
            if endpoint not in self._channels:
                self._channels[endpoint] = self._connector.channel(endpoint, _CHANNEL_OPTIONS)
            return rpc.StorageStub(self._channels[endpoint])


class CoordinatorService:
    """gRPC handlers for the state of the cluster. `event_stats` returns the counters of its KV events."""

    def __init__(
        self,
        coordinator: Coordinator,
        canaries: CanaryRegistry,
        probe: StorageProbe,
        fetches: FetchLog,
        access: Access = OPEN,
        event_stats: Callable[[], dict[str, int]] = dict,
    ) -> None:
        self._access = access
        self._event_stats = event_stats
        self._coordinator = coordinator
        self._fetches = fetches
        self._canaries = canaries
        self._probe = probe

    def handlers(self) -> dict[str, grpc.RpcMethodHandler]:
        return {
            "Membership": unary(self.membership, pb.MembershipRequest),
            "ClusterStats": unary(self.cluster_stats, pb.ClusterStatsRequest),
            "Logs": unary(logs, pb.LogsRequest),
        }

    def membership(
        self,
        request: pb.MembershipRequest,  # noqa: ARG002
        context: grpc.ServicerContext,
    ) -> pb.MembershipReply:
        membership = self._coordinator.membership()
        return pb.MembershipReply(
            epoch=membership.epoch,
            members=[_member(member) for member in membership.members],
            replicas=membership.replicas,
            canary_changes=self._canaries.changes_of(self._access.own_tenant(context)),
        )

    def cluster_stats(
        self,
        request: pb.ClusterStatsRequest,  # noqa: ARG002
        context: grpc.ServicerContext,  # noqa: ARG002
    ) -> pb.ClusterStatsReply:
        nodes = self._coordinator.nodes()
        alive = [node.member for node in nodes if node.alive]
        stats = {
            member.node_id: answer for member, answer in zip(alive, self._probe.stats(alive), strict=True)
        }
        return pb.ClusterStatsReply(
            epoch=self._coordinator.membership().epoch,
            nodes=[_status(node, stats.get(node.member.node_id, node.error)) for node in nodes],
            events=self._event_stats(),
            fetches=self._fetches.fetches,
        )


class CoordinatorServer:
    """Serves the coordinator's endpoint and runs its failure detector, from construction until `stop`. With a `hub` it
    publishes the hub's KV events at `events`. Raises AddressInUseError and ConfigurationError."""

    def __init__(
        self,
        coordinator: Coordinator,
        calibrations: CalibrationRegistry,
        canaries: CanaryRegistry,
        address: Address,
        security: Security = INSECURE,
        hub: EventHub | None = None,
        events: Address | None = None,
    ) -> None:
        access, tls = security.access(), security.server_tls()
        self._probe = StorageProbe(security.connector())
        self._detector = FailureDetector(coordinator, self._probe.failures)
        # Checked at once, so that nodes of the catalogue that answer are members before the first client asks.
        self._detector.check()
        service = pb.DESCRIPTOR.services_by_name["Coordinator"].full_name
        canary_service, fetches = CanaryService(canaries, access), FetchLog(access)
        keys = None if access.is_open else SubscriberKeys(access)
        try:
            self._publisher = None if hub is None else _publisher(hub, coordinator, events, keys)
        except AddressInUseError:
            self._probe.close()
            raise
        event_stats: Callable[[], dict[str, int]] = dict if self._publisher is None else self._publisher.stats

        def forget(tenant: str) -> None:
            canary_service.forget_tenant(tenant)
            fetches.forget(tenant)

        handlers = (
            CoordinatorService(coordinator, canaries, self._probe, fetches, access, event_stats).handlers()
            | fetches.handlers()
            | EventService(self._publisher, keys, access).handlers()
            | PredictService(coordinator, self._probe.stub, access).handlers()
            | DirectiveService(coordinator, forget, access).handlers()
            | CalibrationService(calibrations).handlers()
            | canary_service.handlers()
        )
        try:
            self._server = GrpcServer(address, service, handlers, access=access, tls=tls)
        except AddressInUseError:
            if self._publisher is not None:
                self._publisher.stop()
            self._probe.close()
            raise
        access.start()
        self._access = access
        self._detector.start()
        self.address = self._server.address

    def stop(self, grace_s: float = 1.0) -> None:
        self._server.stop(grace_s)
        if self._publisher is not None:
            self._publisher.stop()
        self._detector.stop()
        self._access.stop()
        self._probe.close()


def serve_coordinator(
    coordinator: Coordinator,
    calibrations: CalibrationRegistry,
    canaries: CanaryRegistry,
    hub: EventHub | None = None,
    *,
    address: Address,
    security: Security = INSECURE,
    events: Address | None = None,
) -> CoordinatorServer:
    """Starts the coordinator's endpoint. Raises AddressInUseError and ConfigurationError."""
    return CoordinatorServer(coordinator, calibrations, canaries, address, security, hub, events)


def _publisher(
    hub: EventHub, coordinator: Coordinator, address: Address | None, keys: SubscriberKeys | None
) -> "EventPublisher | None":
    from kvstore_service.events.publisher import EventPublisher  # needs pyzmq

    return None if address is None else EventPublisher(hub, coordinator.live, address, keys)


def _answer(member: Member, call: grpc.Future) -> pb.StatsReply | str:
    try:
        reply: pb.StatsReply = call.result()
    except grpc.RpcError as error:
        return f"{error.code().name}: {error.details()}"
    if reply.node_id != member.node_id:
        return f"{member.endpoint} belongs to {reply.node_id} now"
    return reply


def _status(node: NodeRecord, answer: pb.StatsReply | str) -> pb.NodeStatus:
    if isinstance(answer, str):
        return pb.NodeStatus(member=_member(node.member), alive=node.alive, error=answer)
    return pb.NodeStatus(member=_member(node.member), alive=True, stats=answer)


def _member(member: Member) -> pb.Member:
    return pb.Member(
        node_id=member.node_id,
        endpoint=member.endpoint,
        weight=member.weight,
        bulk_endpoint=member.bulk_endpoint,
        domain=member.domain,
        draining=member.draining,
    )
