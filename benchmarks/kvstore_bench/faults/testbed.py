"""A cluster of three storage nodes on three Ray nodes on this machine, with access to its processes."""

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
"""Memory of each node. It is smaller than the stored bytes, so that many reads come from disk."""
_DISK_BYTES = 4 << 30
_POLL_S = 0.05
_COORDINATOR = "ray::CoordinatorActor"
_STORAGE = "ray::StorageActor"


class Testbed:
    """The cluster that faults are inflicted on."""

    def __init__(self, ray: RayNodes, cluster: EmbeddedCluster) -> None:
        self.ray = ray
        self.address = cluster.address
        self.ray_names = [f"ray-{number}" for number in range(NODES)]
        self._cluster = cluster

    def storage(self) -> dict[str, int]:
        """Process id of each storage node."""
        return self._cluster.storage_pids()

    def coordinator(self) -> int:
        """Process id of the coordinator. Raises StartupError."""
        for pid, name in self.ray.processes(HEAD).items():
            if name.startswith(_COORDINATOR):
                return pid
        raise StartupError("no process of the coordinator was found")

    def live(self) -> dict[str, pb.Member]:
        """Live members that have just answered the coordinator. Empty while the coordinator is down."""
        try:
            nodes = cluster_stats(self.address).nodes
        except ServiceError:
            return {}
        return {node.member.node_id: node.member for node in nodes if node.alive and node.HasField("stats")}

    def wait_until_whole(self, without: set[str], patience_s: float) -> float:
        """Blocks until all nodes are members, none of them at an endpoint in `without`. Returns the time of that
        (`time.monotonic`)."""
        deadline_s = time.monotonic() + patience_s
        while True:
            live = self.live()
            if len(live) == NODES and not without.intersection(m.endpoint for m in live.values()):
                return time.monotonic()
            if time.monotonic() > deadline_s:
                missing = NODES - len(live)
                raise ServiceError(
                    f"{missing} of {NODES} nodes did not rejoin the cluster within {patience_s:.0f} s"
                )
            time.sleep(_POLL_S)


@contextmanager
def testbed(folder: Path) -> Iterator[Testbed]:
    """Runs a testbed with its files in `folder`, whose path must be short. Raises StartupError."""
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
                insecure=True,  # all on this machine
            )
        ) as cluster:
            yield Testbed(ray, cluster)
