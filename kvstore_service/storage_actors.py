"""The storage nodes of a cluster as Ray actors: where they run, and what becomes of them."""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from kvstore_cluster.background import BackgroundLoop
from kvstore_codec.errors import ServiceError
from kvstore_service.ray_cluster import on_node, ray_nodes
from kvstore_service.ray_messages import reason_of

log = logging.getLogger(__name__)

_PERIOD_S = 1.0
_WAIT_S = 10.0
"""For a step of the loop when it is stopped."""
_WHOLE_S = 600.0
"""Longest wait for missing copies before the next node is restarted."""
_GRACE_S = 1.0
_STOP_TIMEOUT_S = 10.0
_LONGEST_STOP_S = 60.0
"""For a node that is restarted: it may have to write its memory to disk."""
_CALL_TIMEOUT_S = 10.0
_JOIN_TIMEOUT_S = 60.0
_AWAY_S = 3600.0
"""A node without a Ray node is forgotten after this time. If it returns, it joins as a new one."""
_FIRST_RETRY_S, _LONGEST_RETRY_S = 2.0, 60.0

Configuration = tuple[str, str]
"""Version of the service, and a digest of the settings that a node is started with."""
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
    another `configuration`, one after the other, unless they are of another version: whoever upgrades replaces their
    machines. `coordinator` is the handle of a CoordinatorActor. Thread-safe."""

    def __init__(
        self, start: Start, configuration: Configuration, coordinator: Any, *, lasting: bool
    ) -> None:
        self._start, self._configuration, self._lasting = start, configuration, lasting
        self._coordinator = coordinator
        self._lock = threading.Lock()  # guards `_placed`; never held during calls
        self._placed: dict[str, _Placed] = {}
        self._away_s: dict[str, float] | None = None  # known nodes without a Ray node, by name: since when
        self._refused: frozenset[str] = frozenset()
        self._restarted_s = -_WHOLE_S
        self._loop = BackgroundLoop("kvstore-placement", self._step, period_s=_PERIOD_S)

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
        """Stops following, and unless nodes are lasting, ends these. Waits some seconds at most."""
        import ray

        self._loop.stop(_WAIT_S)
        if not self._lasting:
            stop_nodes(self.handles)
            for actor in self.handles.values():
                ray.kill(actor)  # one that was lasting before would stay

    def abandon(self) -> None:
        """Stops following, without waiting."""
        self._loop.stopping.set()

    def place(self) -> None:
        """Starts the nodes that are missing, and forgets those that are gone. Looks after every node, and then raises
        the first error of one."""
        homes = self._homes()
        self._each(
            partial(self._follow_away, homes),
            *(partial(self._look_after, name, ray_id) for name, ray_id in homes.items()),
        )

    def _step(self) -> None:
        self._each(self.place, self._restart_outdated)

    def _each(self, *work: Callable[[], None]) -> None:
        errors: list[Exception] = []
        for do in work:
            if self._loop.stopping.is_set():
                return
            try:
                do()
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def _homes(self) -> dict[str, str]:
        """Ids of Ray nodes by the names of their storage nodes. A name that two Ray nodes have, or that is no name of a
        folder, is left out, unless its storage node runs: an old Ray node may not be noticed as dead yet."""
        found = ray_nodes()
        counts = Counter(node.name for node in found)
        refused = frozenset(
            name
            for name, count in counts.items()
            if count > 1 or Path(name).name != name or name.startswith(".")
        )
        for name in refused - self._refused:
            log.warning(
                "%d Ray nodes have the name %r, and get no storage node; start each with a --node-name of its own, "
                "which can be the name of a folder",
                counts[name],
                name,
            )
        self._refused = refused
        known = {name: placed.ray_id for name, placed in self._placed.items()}
        return {
            node.name: node.ray_id
            for node in found
            if node.name not in refused or known.get(node.name) == node.ray_id
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
                self._ask(self._coordinator.returned, name, ray_id)
                placed = _Placed(ray_id, self._started(name, ray_id), checked=True)
            with self._lock:
                self._placed[name] = placed
        elif _exists(_actor_name(name, ray_id)):
            placed.failures = 0
        else:
            self._start_again(name, placed)

    def _started(self, name: str, ray_id: str) -> Any:
        options = {"name": _actor_name(name, ray_id), **on_node(ray_id)}
        return self._start(name, options | ({"lifetime": "detached"} if self._lasting else {}))

    def _start_again(self, name: str, placed: _Placed) -> None:
        """Starts a node whose process could not start, as when its disk had an error: Ray itself only restarts those
        that have run. Raises ServiceError, which says why it did not start."""
        reason = _reason(placed.actor)
        if time.monotonic() >= placed.retry_s:
            placed.failures += 1
            pause_s = min(_LONGEST_RETRY_S, _FIRST_RETRY_S * 2 ** min(placed.failures, 8))
            placed.retry_s = time.monotonic() + pause_s
            placed.actor, placed.checked = self._started(name, placed.ray_id), True
        raise ServiceError(f"storage node {name} did not start, and is tried again: {reason}")

    def _restart_outdated(self) -> None:
        """Restarts a node that has other settings, once all nodes are there, and have what copies they should have.
        Raises ServiceError if it does not join again: then no other one is restarted before it has."""
        with self._lock:
            unchecked = {name: placed for name, placed in self._placed.items() if not placed.checked}
        for name, placed in unchecked.items():
            version, digest = self._ask(placed.actor.configuration)
            placed.checked = (version, digest) == self._configuration or version != self._configuration[0]
            if not placed.checked:
                if self._is_whole():
                    self._restart(name, placed)
                return

    def _is_whole(self) -> bool:
        import ray

        live = self._ask(self._coordinator.live)
        # One that has stopped in order is not known any more, but has its place.
        if (self.handles.keys() | self._ask(self._coordinator.known)) - live.keys():
            return False
        if time.monotonic() - self._restarted_s > _WHOLE_S:
            return True
        epoch = self._ask(self._coordinator.membership).epoch
        answers = [actor.is_whole.remote(epoch) for name, actor in self.handles.items() if name in live]
        return all(ray.get(answers, timeout=_CALL_TIMEOUT_S))

    def _restart(self, name: str, placed: _Placed) -> None:
        import ray

        log.warning("storage node %s was started with other settings; it restarts", name)
        before = self._ask(self._coordinator.live).get(name)
        stop_nodes({name: placed.actor}, _LONGEST_STOP_S)
        ray.kill(placed.actor)
        deadline_s = time.monotonic() + _JOIN_TIMEOUT_S
        actor_name = _actor_name(name, placed.ray_id)
        self._wait(deadline_s, lambda: not _exists(actor_name))
        placed.actor, placed.checked = self._started(name, placed.ray_id), True
        self._restarted_s = time.monotonic()
        self._wait(
            deadline_s,
            lambda: (
                not _exists(actor_name) or self._ask(self._coordinator.live).get(name) not in (None, before)
            ),
        )
        if not _exists(actor_name):
            raise ServiceError(
                f"storage node {name} does not start with its new settings, so that no other node gets them: "
                f"{_reason(placed.actor)}"
            )

    def _wait(self, deadline_s: float, is_done: Callable[[], bool]) -> None:
        while not is_done() and time.monotonic() < deadline_s and not self._loop.stopping.is_set():
            time.sleep(0.1)

    def _ask(self, method: Any, *arguments: object) -> Any:
        """Result of a call. Raises Ray's errors."""
        import ray

        return ray.get(method.remote(*arguments), timeout=_CALL_TIMEOUT_S)


def stop_nodes(actors: Mapping[str, Any], timeout_s: float = _STOP_TIMEOUT_S) -> None:
    """Lets storage nodes leave the cluster and write their chunks to disk. Logs which did not within `timeout_s`."""
    import ray

    calls = {actor.stop.options(max_task_retries=0).remote(_GRACE_S): name for name, actor in actors.items()}
    if not calls:
        return
    ray.wait(list(calls), num_returns=len(calls), timeout=timeout_s)
    for call, name in calls.items():
        try:
            ray.get(call, timeout=0)
        except ray.exceptions.RayError as error:
            log.warning("storage node %s did not stop in order: %s", name, reason_of(error))


def _reason(actor: Any) -> str:
    """Why an actor has ended."""
    import ray

    try:
        ray.get(actor.pid.remote(), timeout=1.0)
    except ray.exceptions.RayError as error:
        return reason_of(error)
    return "its process ended"


def _exists(actor_name: str) -> bool:
    import ray

    try:
        ray.get_actor(actor_name)
    except ValueError:
        return False
    return True


def _actor_name(name: str, ray_id: str) -> str:
    return f"kvstore-storage:{name}:{ray_id[:16]}"
