"""The storage nodes of a cluster as Ray actors: where they run, and what becomes of them."""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from kvstore_cluster.background import BackgroundLoop
from kvstore_service.ray_cluster import on_node, ray_nodes

log = logging.getLogger(__name__)

_PERIOD_S = 1.0
_GRACE_S = 1.0
_STOP_TIMEOUT_S = 10.0
_CALL_TIMEOUT_S = 10.0
_JOIN_TIMEOUT_S = 60.0
_FIRST_RETRY_S, _LONGEST_RETRY_S = 2.0, 60.0

Start = Callable[[str, Mapping[str, Any]], Any]
"""Starts the actor of the storage node with this id, with these options of Ray. Returns its handle."""


@dataclass(slots=True)
class _Placed:
    """A storage node on a Ray node."""

    ray_id: str
    actor: Any
    failures: int = 0
    retry_s: float = 0.0  # when a node that did not start is started again


class StorageActors:
    """One storage node on each node of a Ray cluster that offers a CPU, also on those that join later. A storage node
    has the name of its Ray node, and does not move: its disk is there. A Ray node that returns under its name gets its
    storage node again, which owns chunks even if it was drained before.

    `lasting` nodes outlive this process. The next one takes them over, and restarts those that were started with
    another `configuration`, one after the other. `coordinator` is the handle of a CoordinatorActor. Thread-safe."""

    def __init__(self, start: Start, configuration: str, coordinator: Any, *, lasting: bool) -> None:
        self._start, self._configuration, self._lasting = start, configuration, lasting
        self._coordinator = coordinator
        self._lock = threading.Lock()  # guards `_placed`; never held during calls
        self._placed: dict[str, _Placed] = {}
        self._twice: frozenset[str] = frozenset()
        self._loop = BackgroundLoop("kvstore-placement", self.place, period_s=_PERIOD_S)

    @property
    def handles(self) -> dict[str, Any]:
        """The actors by node id."""
        with self._lock:
            return {name: placed.actor for name, placed in self._placed.items()}

    def watch(self) -> None:
        """Follows the Ray cluster in the background, until `stop`."""
        self._loop.start()

    def stop(self) -> None:
        """Stops following, and unless nodes are lasting, stops these."""
        self._loop.stop()
        if not self._lasting:
            stop_nodes(self.handles.values())

    def place(self) -> None:
        """Starts the nodes that are missing, and forgets those whose Ray node is gone."""
        homes = self._homes()
        with self._lock:
            gone = [name for name, placed in self._placed.items() if homes.get(name) != placed.ray_id]
            for name in gone:
                del self._placed[name]
        for name in gone:
            log.warning("the Ray node of storage node %s is gone", name)
            self._ask(self._coordinator.departed, name)
        for name, ray_id in homes.items():
            placed = self._placed.get(name)
            if placed is None:
                self._place(name, ray_id)
            elif time.monotonic() >= placed.retry_s and not _exists(self._actor_name(name, ray_id)):
                self._start_again(name, placed)

    def _homes(self) -> dict[str, str]:
        """Ids of Ray nodes by the names of their storage nodes."""
        found = ray_nodes()
        counts = Counter(node.name for node in found)
        twice = frozenset(name for name, count in counts.items() if count > 1)
        for name in twice - self._twice:
            log.warning(
                "%d Ray nodes have the name %s, so none of them gets a storage node that has none yet: an old one may "
                "not be noticed as dead yet; otherwise start them with different --node-name",
                counts[name],
                name,
            )
        self._twice = twice
        known = {name: placed.ray_id for name, placed in self._placed.items()}
        return {
            node.name: node.ray_id
            for node in found
            if node.name not in twice or known.get(node.name) == node.ray_id
        }

    def _place(self, name: str, ray_id: str) -> None:
        import ray

        placed = _Placed(ray_id, None)
        try:
            placed.actor = ray.get_actor(self._actor_name(name, ray_id))
        except ValueError:
            placed.actor = self._started(name, ray_id)
            self._keep(name, placed)
            self._ask(self._coordinator.returned, name)
        else:
            self._keep(name, placed)
            if self._is_outdated(placed.actor):
                self._replace(name, placed)

    def _keep(self, name: str, placed: _Placed) -> None:
        with self._lock:
            self._placed[name] = placed

    def _started(self, name: str, ray_id: str) -> Any:
        options = {"name": self._actor_name(name, ray_id), **on_node(ray_id)}
        return self._start(name, options | ({"lifetime": "detached"} if self._lasting else {}))

    def _start_again(self, name: str, placed: _Placed) -> None:
        """Starts a node whose process could not start, as when its disk had an error. Ray itself only restarts those
        that have run."""
        placed.failures += 1
        pause_s = min(_LONGEST_RETRY_S, _FIRST_RETRY_S * 2 ** min(placed.failures, 8))
        placed.retry_s = time.monotonic() + pause_s
        log.warning("storage node %s did not start; trying again, next in %.0f s", name, pause_s)
        placed.actor = self._started(name, placed.ray_id)

    def _is_outdated(self, actor: Any) -> bool:
        import ray

        try:
            return bool(self._ask(actor.configuration) != self._configuration)
        except ray.exceptions.RayError:  # it restarts, or is busy
            return False

    def _replace(self, name: str, placed: _Placed) -> None:
        """Starts a node with new settings, and waits until it has joined, so that only one is away at a time."""
        import ray

        log.warning("storage node %s was started with other settings; it restarts", name)
        before = self._ask(self._coordinator.live).get(name)
        try:
            stop_nodes([placed.actor])
        except ray.exceptions.RayError as error:
            log.warning("storage node %s did not stop in order: %s", name, error)
        ray.kill(placed.actor)
        deadline_s = time.monotonic() + _JOIN_TIMEOUT_S
        actor_name = self._actor_name(name, placed.ray_id)
        while _exists(actor_name) and time.monotonic() < deadline_s:
            time.sleep(0.1)
        placed.actor = self._started(name, placed.ray_id)
        while self._ask(self._coordinator.live).get(name) in (None, before) and time.monotonic() < deadline_s:
            time.sleep(0.1)

    def _ask(self, method: Any, *arguments: object) -> Any:
        """Result of a call. Raises Ray's errors."""
        import ray

        return ray.get(method.remote(*arguments), timeout=_CALL_TIMEOUT_S)

    def _actor_name(self, name: str, ray_id: str) -> str:
        return f"kvstore-storage:{name}:{ray_id[:16]}"


def stop_nodes(actors: Iterable[Any]) -> None:
    """Lets storage nodes leave the cluster and write their chunks to disk. Raises Ray's errors."""
    import ray

    calls = [actor.stop.options(max_task_retries=0).remote(_GRACE_S) for actor in actors]
    ray.get(calls, timeout=_STOP_TIMEOUT_S)


def _exists(actor_name: str) -> bool:
    import ray

    try:
        ray.get_actor(actor_name)
    except ValueError:
        return False
    return True
