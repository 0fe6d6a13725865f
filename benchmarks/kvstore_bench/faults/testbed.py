"""A cluster of three storage nodes on three Ray nodes of this machine, whose processes can be found."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_bench.faults.ray_nodes import HEAD, RayNodes
from kvstore_codec.errors import ServiceError, StartupError
from kvstore_service.cluster_stats import cluster_stats
from kvstore_service.embedded import EmbeddedCluster
from kvstore_service.settings import settings_of

NODES = 3
REPLICAS = 2
_MEMORY_BYTES = 64 << 20
"""Of each node; less than is stored, so that much is read from disk."""
_DISK_BYTES = 4 << 30
_POLL_S = 0.05
_COORDINATOR = "ray::CoordinatorActor"
_STORAGE = "ray::StorageActor"


class Testbed:
    """What the faults are inflicted on."""

    def __init__(self, ray: RayNodes, cluster: EmbeddedCluster) -> None:
        self.ray = ray
        self.address = cluster.address
        self.ray_names = [f"ray-{number}" for number in range(NODES)]
        self._cluster = cluster

    def storage(self) -> dict[str, int]:
        """Process id of each storage node."""
        return self._cluster.storage_pids()

    def coordinator(self) -> int:
        """Its process id. Raises StartupError."""
        for pid, name in self.ray.processes(HEAD).items():
            if name.startswith(_COORDINATOR):
                return pid
        raise StartupError("the coordinator has no process")

    def live(self) -> dict[str, pb.Member]:
        """The members that the coordinator counts as alive and has heard of just now; none while it is away."""
        try:
            nodes = cluster_stats(self.address).nodes
        except ServiceError:
            return {}
        return {node.member.node_id: node.member for node in nodes if node.alive and node.HasField("stats")}

    def wait_until_whole(self, without: set[str], patience_s: float) -> float:
        """Until all nodes are members again, none of them at an endpoint of `without`. The time that it was."""
        deadline_s = time.monotonic() + patience_s
        while True:
            live = self.live()
            if len(live) == NODES and not without.intersection(m.endpoint for m in live.values()):
                return time.monotonic()
            if time.monotonic() > deadline_s:
                missing = NODES - len(live)
                raise ServiceError(f"{missing} of {NODES} nodes did not come back within {patience_s:.0f} s")
            time.sleep(_POLL_S)


@contextmanager
def testbed(folder: Path) -> Iterator[Testbed]:
    """Its files are in `folder`, whose path has to be short. Raises StartupError."""
    (folder / "ray").mkdir()
    with RayNodes(folder / "ray") as ray:
        for number in range(NODES):
            ray.start(f"ray-{number}")
        with EmbeddedCluster(
            settings_of(
                ray_address=ray.address,
                memory=_MEMORY_BYTES,
                disk=_DISK_BYTES,
                data_dir=folder / "data",
                durability="durable",
                replicas=REPLICAS,
            )
        ) as cluster:
            yield Testbed(ray, cluster)
