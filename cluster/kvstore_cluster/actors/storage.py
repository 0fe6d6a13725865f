"""A storage node as a Ray actor."""

import logging
import os
import threading
import time
from collections.abc import Callable

import ray
import ray.exceptions

from kvstore_api.placement import Member
from kvstore_cluster.actors.endpoint import Endpoint
from kvstore_cluster.arena import Arena
from kvstore_cluster.node import StorageNode

log = logging.getLogger(__name__)

# How soon a coordinator that lost its state hears of this node again.
_REGISTER_PERIOD_S = 1.0
_REGISTER_TIMEOUT_S = 5.0


class StorageActor:
    """Made through `ray.remote`; `coordinator` is the name of a CoordinatorActor. After a crash Ray runs the
    constructor again: the node is then empty, listens on another port and joins as a new incarnation.

    Raises ConfigurationError when the memory cannot be had, AddressInUseError.
    """

    def __init__(
        self,
        node_id: str,
        memory_bytes: int,
        coordinator: str,
        serve: Callable[[StorageNode], Endpoint],
    ) -> None:
        self._endpoint = serve(StorageNode(node_id, Arena(memory_bytes)))
        self._member = Member(node_id, self._endpoint.address, memory_bytes / (1 << 30))
        self._incarnation = time.time_ns()
        # By name: Ray cannot restart an actor whose constructor was given a handle that it has forgotten.
        self._coordinator = ray.get_actor(coordinator)
        self._stopping = threading.Event()
        self._registering = threading.Thread(target=self._keep_registered, name="kvstore-join", daemon=True)
        self._registering.start()

    def pid(self) -> int:
        return os.getpid()

    def stop(self, grace_s: float) -> None:
        """Leaves the cluster, then stops the endpoint."""
        self._stopping.set()
        self._registering.join()
        ray.get(
            self._coordinator.leave.remote(self._member.node_id, self._incarnation),
            timeout=_REGISTER_TIMEOUT_S,
        )
        self._endpoint.stop(grace_s)

    def _keep_registered(self) -> None:
        """Joins, and repeats it: a coordinator that restarted may not know this node."""
        while not self._stopping.is_set():
            try:
                ray.get(
                    self._coordinator.join.remote(self._member, self._incarnation),
                    timeout=_REGISTER_TIMEOUT_S,
                )
            except ray.exceptions.RayError as error:
                log.warning("node %s could not register, trying again: %s", self._member.node_id, error)
            self._stopping.wait(_REGISTER_PERIOD_S)
