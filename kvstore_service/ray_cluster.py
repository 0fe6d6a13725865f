"""An existing Ray cluster. This process connects to it, starts actors on it, and leaves it running."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from kvstore_codec.errors import StartupError
from kvstore_service import signals
from kvstore_service.listen import Address
from kvstore_service.local_ray import ENVIRONMENT
from kvstore_service.ray_messages import silent_ray

_NAMESPACE = "kvstore"
_SOME_CPU = 0.01
_CONNECT_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class RayNode:
    """A node of a Ray cluster. `name` is the one of `ray start --node-name`, or else its IP address."""

    name: str
    ray_id: str


@contextmanager
def existing_ray(address: str, host: str | None = None) -> Iterator[None]:
    """Connects this process to the Ray cluster at `address` while the block runs, through the Ray node of this machine
    at the IP address `host`; None: the one that Ray finds. Raises StartupError."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", ENVIRONMENT["RAY_USAGE_STATS_ENABLED"])
    import ray

    if ray.is_initialized():
        raise StartupError("Ray already runs in this process; start the cluster in a process without Ray")
    require_answer(address)
    with silent_ray():
        try:
            with signals.deferred():
                ray.init(
                    address=address,
                    namespace=_NAMESPACE,
                    log_to_driver=False,
                    logging_level="ERROR",
                    **({} if host is None else {"_node_ip_address": host}),
                )
        except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            raise StartupError(f"cannot connect to a Ray cluster at {address}: {error}") from error
        try:
            yield
        finally:
            ray.shutdown()


def ray_nodes() -> list[RayNode]:
    """The live Ray nodes that offer a CPU, sorted by name."""
    import ray

    found = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    return sorted(
        (RayNode(node["NodeName"], node["NodeID"]) for node in found),
        key=lambda node: (node.name, node.ray_id),
    )


def on_node(node_id: str) -> dict[str, Any]:
    """Actor options that start the actor on Ray node `node_id`, and nowhere else."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # Ray places an actor that requests no resources on any node.
    return {"num_cpus": _SOME_CPU, "scheduling_strategy": NodeAffinitySchedulingStrategy(node_id, soft=False)}


def on_this_node() -> dict[str, Any]:
    """Actor options that start the actor on the Ray node of this process, even if that node offers no CPU."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(_here(), soft=False)}


def require_answer(address: str) -> None:
    """Raises StartupError if nothing listens at `address`. Ray itself would retry for minutes."""
    if ":" not in address:  # "auto"
        return
    where = Address.parse(address)
    try:
        socket.create_connection((where.host, where.port), _CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise StartupError(
            f"cannot connect to a Ray cluster at {address} ({error}); start one with `ray start --head --port ...`"
        ) from error


def _here() -> str:
    import ray

    return str(ray.get_runtime_context().get_node_id())
