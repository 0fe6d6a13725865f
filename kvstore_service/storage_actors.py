"""The storage nodes of a cluster as Ray actors: where they run, and what becomes of them."""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from kvstore_cluster.background import BackgroundLoop
from kvstore_service.ray_cluster import on_node, ray_nodes

log = logging.getLogger(__name__)

_PERIOD_S = 1.0
_GRACE_S = 1.0
_STOP_TIMEOUT_S = 10.0
_CALL_TIMEOUT_S = 10.0
_JOIN_TIMEOUT_S = 60.0
_AWAY_S = 3600.0
"""A node without a Ray node is forgotten after this time. If it returns, it joins as a new one."""
_FIRST_RETRY_S, _LONGEST_RETRY_S = 2.0, 60.0

Start = Callable[[str, Mapping[str, Any]], Any]
"""Starts the actor of the storage node with this id, with these options of Ray. Returns its handle."""


@dataclass(slots=True)
class _Placed:
    """A storage node on a Ray node. `checked` says that it was started with the settings of this process."""

    ray_id: str
    actor: Any
    checked: bool
    failures: int = 0  # in a row
    retry_s: float = 0.0  # when a node that did not start is started again


class StorageActors:
    """One storage node on each node of a Ray cluster that offers a CPU, also on those that join later. A storage node
    has the name of its Ray node, and does not move: its disk is there. A Ray node that returns under its name gets its
    storage node again, which owns chunks even if it was drained before. A storage node whose Ray node is gone is
    forgotten if it was drained, or after an hour.

    `lasting` nodes outlive this process. The next one takes them over, and restarts those that were started with
    another `configuration`, one after the other. `coordinator` is the handle of a CoordinatorActor. Thread-safe."""

    def __init__(self, start: Start, configuration: str, coordinator: Any, *, lasting: bool) -> None:
        self._start, self._configuration, self._lasting = start, configuration, lasting
        self._coordinator = coordinator
        self._lock = threading.Lock()  # guards `_placed`; never held during calls
        self._placed: dict[str, _Placed] = {}
        self._away_s: dict[str, float] | None = None  # known nodes without a Ray node, by name: since when
        self._twice: frozenset[str] = frozenset()
        self._loop = BackgroundLoop("kvstore-placement", self.place, period_s=_PERIOD_S)

    @property
    def handles(self) -> dict[str, Any]:
        """The actors by node id."""
        with self._lock:
            return {name: placed.actor for name, placed in self._placed.items()}

    def ended(self) -> set[str]:
        """Ids of nodes whose process could not start."""
        with self._lock:
            placed = [(name, each.ray_id) for name, each in self._placed.items()]
        return {name for name, ray_id in placed if not _exists(_actor_name(name, ray_id))}

    def watch(self) -> None:
        """Follows the Ray cluster in the background, until `stop`."""
        self._loop.start()

    def stop(self) -> None:
        """Stops following, and unless nodes are lasting, stops these."""
        self._loop.stop()
        if not self._lasting:
            stop_nodes(self.handles.values())

    def place(self) -> None:
        """Starts the nodes that are missing, and forgets those that are gone. Looks after every node, and then raises
        the first error of one."""
        homes = self._homes()
        errors: list[Exception] = []
        for work in (
            partial(self._follow_away, homes),
            *(partial(self._look_after, name, ray_id) for name, ray_id in homes.items()),
        ):
            try:
                work()
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]

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

    def _follow_away(self, homes: Mapping[str, str]) -> None:
        now_s = time.monotonic()
        if self._away_s is None:
            self._away_s = dict.fromkeys(self._ask(self._coordinator.known), now_s)
        with self._lock:
            gone = [name for name, placed in self._placed.items() if homes.get(name) != placed.ray_id]
            for name in gone:
                del self._placed[name]
        for name in gone:
            log.warning("the Ray node of storage node %s is gone", name)
            self._away_s[name] = now_s
        for name, since_s in list(self._away_s.items()):
            is_over = now_s - since_s > _AWAY_S
            if name in homes or self._ask(self._coordinator.departed, name, is_over):
                del self._away_s[name]

    def _look_after(self, name: str, ray_id: str) -> None:
        import ray

        placed = self._placed.get(name)
        if placed is None:
            try:
                placed = _Placed(ray_id, ray.get_actor(_actor_name(name, ray_id)), checked=False)
            except ValueError:
                self._ask(self._coordinator.returned, name)
                placed = _Placed(ray_id, self._started(name, ray_id), checked=True)
            with self._lock:
                self._placed[name] = placed
        elif _exists(_actor_name(name, ray_id)):
            placed.failures = 0
        elif time.monotonic() >= placed.retry_s:
            self._start_again(name, placed)
        if not placed.checked:
            self._check(name, placed)

    def _started(self, name: str, ray_id: str) -> Any:
        options = {"name": _actor_name(name, ray_id), **on_node(ray_id)}
        return self._start(name, options | ({"lifetime": "detached"} if self._lasting else {}))

    def _start_again(self, name: str, placed: _Placed) -> None:
        """Starts a node whose process could not start, as when its disk had an error. Ray itself only restarts those
        that have run."""
        placed.failures += 1
        pause_s = min(_LONGEST_RETRY_S, _FIRST_RETRY_S * 2 ** min(placed.failures, 8))
        placed.retry_s = time.monotonic() + pause_s
        log.warning("storage node %s did not start; trying again, next in %.0f s", name, pause_s)
        placed.actor, placed.checked = self._started(name, placed.ray_id), True

    def _check(self, name: str, placed: _Placed) -> None:
        """Starts a node that has other settings again, and waits until it has joined, so that only one is away at a
        time."""
        import ray

        try:
            placed.checked = self._ask(placed.actor.configuration) == self._configuration
        except ray.exceptions.RayError:  # it restarts, or is busy; it is asked again
            return
        if placed.checked:
            return
        log.warning("storage node %s was started with other settings; it restarts", name)
        before = self._ask(self._coordinator.live).get(name)
        try:
            stop_nodes([placed.actor])
        except ray.exceptions.RayError as error:
            log.warning("storage node %s did not stop in order: %s", name, error)
        ray.kill(placed.actor)
        deadline_s = time.monotonic() + _JOIN_TIMEOUT_S
        self._wait(deadline_s, lambda: not _exists(_actor_name(name, placed.ray_id)))
        placed.actor, placed.checked = self._started(name, placed.ray_id), True
        self._wait(deadline_s, lambda: self._ask(self._coordinator.live).get(name) not in (None, before))

    def _wait(self, deadline_s: float, is_done: Callable[[], bool]) -> None:
        while not is_done() and time.monotonic() < deadline_s and not self._loop.stopping.is_set():
            time.sleep(0.1)

    def _ask(self, method: Any, *arguments: object) -> Any:
        """Result of a call. Raises Ray's errors."""
        import ray

        return ray.get(method.remote(*arguments), timeout=_CALL_TIMEOUT_S)


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


def _actor_name(name: str, ray_id: str) -> str:
    return f"kvstore-storage:{name}:{ray_id[:16]}"
