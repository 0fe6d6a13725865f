"""A whole cluster on this machine: local Ray, one coordinator, storage nodes, an embedded catalogue."""

import importlib.util
import logging
import tempfile
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self

from kvstore_cluster.arena import require_memory
from kvstore_cluster.catalogue import FileCatalogue
from kvstore_codec.errors import ConfigurationError, ServiceError, StartupError
from kvstore_service.cluster_stats import cluster_stats
from kvstore_service.listen import Address, Reservation
from kvstore_service.local_ray import ESSENTIAL, RayProcesses, local_ray

log = logging.getLogger(__name__)

DEFAULT_MEMORY_BYTES = 1 << 30
_START_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 3.0
_GRACE_S = 1.0
_PID_TIMEOUT_S = 30.0
# Ray brings a coordinator back within seconds, unless it gave up on it.
_SILENCE_S = 30.0
_LONGEST_SCRATCH_PARENT = 30

_ACTOR_OPTIONS = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1, "max_concurrency": 16}
# Of the extra `cluster`; imported where they are used, because an inference worker does without.
_PACKAGES = ("grpc_reflection", "psutil", "ray")
_COORDINATOR_NAME = "kvstore-coordinator"


class EmbeddedCluster:
    """Context manager; `address` is the coordinator's host:port once started.

    `memory_bytes` is the DRAM of each of the `nodes`; `data_dir` keeps the catalogue, a temporary folder when
    None. Starting raises ConfigurationError, AddressInUseError and CatalogueError before Ray is touched, and
    StartupError for what goes wrong later.
    """

    def __init__(
        self,
        *,
        nodes: int = 1,
        memory_bytes: int = DEFAULT_MEMORY_BYTES,
        listen: str = "127.0.0.1:0",
        data_dir: Path | None = None,
    ) -> None:
        if nodes < 1:
            raise ConfigurationError(f"a cluster has at least one storage node, not {nodes}")
        require_memory(memory_bytes, nodes=nodes)
        self._nodes = nodes
        self._memory_bytes = memory_bytes
        self._listen = Address.parse(listen)
        self._data_dir = data_dir
        self._coordinator: Any = None  # Ray's actor handles know the actors' methods only at run time
        self._storage: dict[str, Any] = {}
        self._running = ExitStack()
        self._ray: RayProcesses  # once started
        self._silent_since_s: float | None = None
        self.address = ""

    def start(self) -> None:
        """Returns when every node has joined and clients may come."""
        _require_packages()
        with ExitStack() as started:
            reservation = Reservation(self._listen)
            started.callback(reservation.release)
            scratch = Path(started.enter_context(_scratch_folder()))
            data_dir = self._data_dir or scratch / "catalogue"
            _check_catalogue(data_dir)
            self._ray = started.enter_context(local_ray(scratch / "ray"))
            started.callback(self._stop_actors)
            self._start_actors(data_dir, reservation.address)
            self._running = started.pop_all()

    def stop(self) -> None:
        """Ends what `start` began and leaves neither processes nor temporary files. May be called again."""
        self._running.close()

    def check(self) -> None:
        """Raises ServiceError when the cluster is gone for good: a process of Ray's has died, or the coordinator has
        not answered for 30 s. For a caller that asks every few seconds; `stop` remains to be called."""
        missing = set(ESSENTIAL).difference(self._ray.look())
        if missing:
            self._lost(f"Ray's {' and '.join(sorted(missing))} ended")
        try:
            cluster_stats(self.address)
        except ServiceError:
            now_s = time.monotonic()
            if self._silent_since_s is None:
                self._silent_since_s = now_s
            if now_s - self._silent_since_s >= _SILENCE_S:
                self._lost(f"its coordinator has not answered for {_SILENCE_S:.0f} s and does not come back")
        else:
            self._silent_since_s = None

    def storage_pids(self) -> dict[str, int]:
        """Process id of each storage node; waits for a node that is being restarted."""
        import ray

        pids = ray.get([node.pid.remote() for node in self._storage.values()], timeout=_PID_TIMEOUT_S)
        return dict(zip(self._storage, pids, strict=True))

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _start_actors(self, data_dir: Path, address: Address) -> None:
        import ray

        from kvstore_cluster.actors.coordinator import CoordinatorActor
        from kvstore_cluster.actors.storage import StorageActor
        from kvstore_service.grpc_coordinator import serve_coordinator
        from kvstore_service.grpc_storage import serve_storage

        coordinator = ray.remote(CoordinatorActor).options(name=_COORDINATOR_NAME, **_ACTOR_OPTIONS)
        self._coordinator = coordinator.remote(
            data_dir.absolute(), partial(serve_coordinator, address=address)
        )
        storage = ray.remote(StorageActor).options(**_ACTOR_OPTIONS)
        serve = partial(serve_storage, host=address.host)
        names = [f"node-{number}" for number in range(self._nodes)]
        self._storage = {
            name: storage.remote(name, self._memory_bytes, _COORDINATOR_NAME, serve) for name in names
        }
        try:
            self.address = ray.get(self._coordinator.address.remote(), timeout=_START_TIMEOUT_S)
            self.storage_pids()
            self._wait_until_joined()
        except ray.exceptions.RayError as error:
            # Ray reports a failed constructor as a whole remote traceback; its last line is the reason.
            reason = str(error).strip().splitlines()[-1]
            raise StartupError(f"the cluster did not start: {reason}") from error

    def _wait_until_joined(self) -> None:
        import ray

        deadline_s = time.monotonic() + _START_TIMEOUT_S
        missing = set(self._storage)
        while missing:
            if time.monotonic() > deadline_s:
                raise StartupError(
                    f"{', '.join(sorted(missing))} did not join within {_START_TIMEOUT_S:.0f} s"
                )
            time.sleep(0.02)
            membership = ray.get(self._coordinator.membership.remote(), timeout=_START_TIMEOUT_S)
            missing = set(self._storage) - {member.node_id for member in membership.members}

    def _lost(self, reason: str) -> NoReturn:
        # Nobody is left to be stopped in order.
        self._storage = {}
        self._coordinator = None
        raise ServiceError(f"the cluster at {self.address} is gone: {reason}; start it again")

    def _stop_actors(self) -> None:
        import ray

        if self._coordinator is None:
            return
        try:
            ray.get(
                [node.stop.options(max_task_retries=0).remote(_GRACE_S) for node in self._storage.values()],
                timeout=_STOP_TIMEOUT_S,
            )
            ray.get(
                self._coordinator.stop.options(max_task_retries=0).remote(_GRACE_S), timeout=_STOP_TIMEOUT_S
            )
        except ray.exceptions.RayError as error:
            log.warning("the cluster did not stop in order and is ended: %s", error)
        self._storage = {}
        self._coordinator = None


def _scratch_folder() -> tempfile.TemporaryDirectory[str]:
    # Ray puts sockets far below it, and the path of a socket may have 107 bytes.
    parent = tempfile.gettempdir() if len(tempfile.gettempdir()) <= _LONGEST_SCRATCH_PARENT else "/tmp"  # noqa: S108
    return tempfile.TemporaryDirectory(prefix="kvstore-", dir=parent, ignore_cleanup_errors=True)


def _require_packages() -> None:
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise StartupError(f"a cluster needs {', '.join(missing)}: pip install 'kvstore-service[cluster]'")


def _check_catalogue(data_dir: Path) -> None:
    catalogue = FileCatalogue(data_dir)
    try:
        catalogue.load()
    finally:
        catalogue.close()
