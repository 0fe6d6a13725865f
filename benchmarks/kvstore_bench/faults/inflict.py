"""Inflicts faults on a cluster, one at a time."""

import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from kvstore_bench.faults.testbed import Testbed

_PATIENCE_S = 90.0
_PARTITION_S = (2.0, 5.0)


class Kind(StrEnum):
    STORAGE = "storage actor"
    RAYLET = "raylet"
    COORDINATOR = "coordinator"
    PARTITION = "partition"


WEIGHTS = {Kind.STORAGE: 5, Kind.RAYLET: 2, Kind.COORDINATOR: 2, Kind.PARTITION: 2}


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault, and the storage nodes it affected. Times are those of `time.monotonic`."""

    kind: Kind
    nodes: tuple[str, ...]
    at_s: float
    back_s: float
    """Time when every storage node was a member of the cluster again."""

    @property
    def is_kill(self) -> bool:
        return self.kind is not Kind.PARTITION


def inflict(kind: Kind, testbed: Testbed, chance: random.Random) -> Fault:
    """Inflicts a fault. Blocks until all nodes are members again. Raises ServiceError if that takes too long."""
    return _FAULTS[kind](testbed, chance)


def _kill_storage(testbed: Testbed, chance: random.Random) -> Fault:
    storage, endpoints = testbed.storage(), _endpoints(testbed)
    node = chance.choice(sorted(storage))
    at_s = time.monotonic()
    os.kill(storage[node], signal.SIGKILL)
    return Fault(Kind.STORAGE, (node,), at_s, testbed.wait_until_whole({endpoints[node]}, _PATIENCE_S))


def _kill_raylet(testbed: Testbed, chance: random.Random) -> Fault:
    """Kills a raylet and all its child processes, as if a machine died, and then restarts the Ray node."""
    storage, endpoints = testbed.storage(), _endpoints(testbed)
    name = chance.choice(testbed.ray_names)
    processes = testbed.ray.processes(name)
    nodes = tuple(node for node, pid in sorted(storage.items()) if pid in processes)
    at_s = time.monotonic()
    # The raylet is killed first. Otherwise it would report the deaths of the others, which a dead machine does not.
    for pid in sorted(processes, key=lambda pid: processes[pid] != "raylet"):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue  # it ended with its parent
    testbed.ray.wait_until_gone(name)
    testbed.ray.start(name)
    back_s = testbed.wait_until_whole({endpoints[node] for node in nodes}, _PATIENCE_S)
    return Fault(Kind.RAYLET, nodes, at_s, back_s)


def _kill_coordinator(testbed: Testbed, chance: random.Random) -> Fault:  # noqa: ARG001 (there is only one)
    pid = testbed.coordinator()
    at_s = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    return Fault(Kind.COORDINATOR, (), at_s, testbed.wait_until_whole(set(), _PATIENCE_S))


def _partition(testbed: Testbed, chance: random.Random) -> Fault:
    """Suspends one storage node, which keeps its connections but does not answer, and then resumes it."""
    storage = testbed.storage()
    node = chance.choice(sorted(storage))
    at_s = time.monotonic()
    os.kill(storage[node], signal.SIGSTOP)
    try:
        time.sleep(chance.uniform(*_PARTITION_S))
    finally:
        os.kill(storage[node], signal.SIGCONT)
    return Fault(Kind.PARTITION, (node,), at_s, testbed.wait_until_whole(set(), _PATIENCE_S))


def _endpoints(testbed: Testbed) -> dict[str, str]:
    return {node: member.endpoint for node, member in testbed.live().items()}


_FAULTS: dict[Kind, Callable[[Testbed, random.Random], Fault]] = {
    Kind.STORAGE: _kill_storage,
    Kind.RAYLET: _kill_raylet,
    Kind.COORDINATOR: _kill_coordinator,
    Kind.PARTITION: _partition,
}
