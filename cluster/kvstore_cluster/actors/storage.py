"""A storage node as a Ray actor."""

import logging
import os
import time
from collections.abc import Callable
from typing import Any, TypeVar

import ray
import ray.exceptions

from kvstore_api.placement import Member
from kvstore_cluster.actors.endpoint import NodeEndpoint, do_nothing
from kvstore_cluster.arena import Arena
from kvstore_cluster.background import BackgroundLoop
from kvstore_cluster.disk import SegmentStore
from kvstore_cluster.events.base import NodeReport
from kvstore_cluster.events.feed import ReportFeed
from kvstore_cluster.eviction import POLICIES
from kvstore_cluster.maintenance import MaintenanceThread
from kvstore_cluster.node import StorageNode
from kvstore_cluster.repair import PeerNodes, RepairWorker
from kvstore_cluster.slow_disk import SlowNode, SlowStore
from kvstore_cluster.storage_options import StorageOptions
from kvstore_codec.errors import FolderInUseError

log = logging.getLogger(__name__)

Store = TypeVar("Store", bound=SegmentStore)

# Period of registrations. A coordinator that lost its state learns of this node within this time.
_REGISTER_PERIOD_S = 1.0
_REGISTER_TIMEOUT_S = 5.0
# Longest wait for the folder: the node's previous process may outlive its raylet for a while.
_PREDECESSOR_PATIENCE_S = 60.0


class StorageActor:
    """The process of a storage node. Created through `ray.remote`. `coordinator` is the name of a CoordinatorActor,
    which may be replaced by another one of that name. After a crash, Ray runs the constructor again: the node recovers
    its chunks from disk, listens on another port unless `serve` fixes it, and joins as a new incarnation.

    Raises ConfigurationError when memory or disk cannot be allocated, EncryptionKeyError, AddressInUseError, DiskError.
    """

    def __init__(
        self,
        node_id: str,
        options: StorageOptions,
        coordinator: str,
        serve: Callable[[StorageNode, RepairWorker], NodeEndpoint],
        peers: Callable[[StorageNode], PeerNodes],
        prepare: Callable[[], object] = do_nothing,
        configuration: tuple[str, str] = ("", ""),
    ) -> None:
        """`prepare` is called before everything else. `configuration` is the version of the service, and tells
        these arguments from others."""
        prepare()
        self._configuration = configuration
        arena = Arena(options.memory_bytes)
        self._node = _open_node(node_id, arena, options)
        self._repair = RepairWorker(
            self._node, peers(self._node), bytes_per_s=options.repair_bandwidth_bps / 8
        )
        self._endpoint = serve(self._node, self._repair)
        self._member = Member(
            node_id,
            self._endpoint.address,
            weight=(options.memory_bytes + options.disk_bytes) / (1 << 30),
            bulk_endpoint=self._endpoint.bulk_address,
            domain=ray.get_runtime_context().get_node_id(),
        )
        self._incarnation = time.time_ns()
        self._maintenance = MaintenanceThread(self._node, arena)
        # A name, because Ray cannot restart an actor whose constructor argument is a handle that it no longer knows. It
        # is looked up later, because Ray does not restart one whose constructor failed, as without a coordinator.
        self._coordinator_name = coordinator
        self._coordinator: Any = None
        self._directives_version = 0
        self._registering = BackgroundLoop("kvstore-join", self._stay_registered)
        changes = self._node.changes
        self._feed = (
            None if changes is None else ReportFeed(node_id, self._incarnation, changes, self._report)
        )
        for background in (self._maintenance, self._repair, self._registering, self._feed):
            if background is not None:
                background.start()

    def pid(self) -> int:
        return os.getpid()

    def configuration(self) -> tuple[str, str]:
        return self._configuration

    def is_whole(self, epoch: int) -> bool:
        """Whether the node has looked for missing copies since the membership has this epoch, and knows of none."""
        gauges = self._repair.gauges(0)
        return gauges["repair_epoch"] >= epoch and not gauges["repair_running"] and not gauges["repair_left"]

    def stop(self, grace_s: float) -> None:
        """Leaves the cluster, stops the endpoint, and writes dirty chunks to disk."""
        self._registering.stop()
        if self._feed is not None:
            self._feed.stop()
        if self._coordinator is not None:
            try:
                ray.get(
                    self._coordinator.leave.remote(self._member.node_id, self._incarnation),
                    timeout=_REGISTER_TIMEOUT_S,
                )
            except ray.exceptions.RayError as error:
                log.warning("node %s could not leave the cluster: %s", self._member.node_id, error)
        self._endpoint.stop(grace_s)
        self._repair.stop()
        self._maintenance.stop()
        self._node.close()

    def _report(self, report: NodeReport) -> bool:
        coordinator = self._coordinator
        return coordinator is not None and bool(
            ray.get(coordinator.report.remote(report), timeout=_REGISTER_TIMEOUT_S)
        )

    def _stay_registered(self) -> None:
        """Registers the node once, applies the coordinator's directives, and waits for one period, unless it has to
        register again at once. Registration is repeated, because a restarted coordinator may not know this node, and
        the membership changes."""
        try:
            if self._coordinator is None:
                self._coordinator = ray.get_actor(self._coordinator_name)
            directives = ray.get(
                self._coordinator.join.remote(
                    self._member,
                    self._incarnation,
                    self._directives_version,
                    self._node.forgotten_generation,
                ),
                timeout=_REGISTER_TIMEOUT_S,
            )
        except (ValueError, ray.exceptions.ActorDiedError):
            self._coordinator = None  # another one may have taken its place
            log.info("node %s waits for a coordinator", self._member.node_id)
        except ray.exceptions.RayError as error:
            log.warning("node %s could not register, trying again: %s", self._member.node_id, error)
        else:
            # Before repair hears of members to which it would copy these chunks.
            self._node.forget(directives.forgotten)
            if directives.pins is not None:
                self._node.set_pins(directives.pins)
            if directives.quotas is not None:
                self._node.set_quotas(directives.quotas)
            self._node.set_draining(directives.draining)
            self._repair.update(directives)
            self._directives_version = directives.version
            if directives.forgotten is not None:
                return
        self._registering.stopping.wait(_REGISTER_PERIOD_S)


def _open_node(node_id: str, arena: Arena, options: StorageOptions) -> StorageNode:
    """Opens the node and its disk. Raises DiskError."""
    durability, policy = options.durability, POLICIES[options.policy]
    isolated, events = options.isolated, options.events
    if options.experiments:
        slow = _open_store(node_id, options, SlowStore)
        return SlowNode(
            node_id,
            arena,
            store=slow,
            durability=durability,
            policy=policy,
            isolated=isolated,
            events=events,
        )
    store = _open_store(node_id, options, SegmentStore)
    return StorageNode(
        node_id, arena, store=store, durability=durability, policy=policy, isolated=isolated, events=events
    )


def _open_store(node_id: str, options: StorageOptions, store_type: type[Store]) -> Store | None:
    """Opens the node's disk. Waits until the node's previous process has released the folder. Raises DiskError."""
    if not options.disk_bytes or options.folder is None:
        return None
    keys = None if options.keys is None else options.keys()
    deadline_s = time.monotonic() + _PREDECESSOR_PATIENCE_S
    while True:
        try:
            return store_type(options.folder, options.disk_bytes, keys=keys)
        except FolderInUseError:
            if time.monotonic() > deadline_s:
                raise
            log.warning("the disk of %s is still in use by its previous process, waiting", node_id)
            time.sleep(0.1)
