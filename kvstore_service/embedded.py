"""A complete cluster: one coordinator and storage nodes, on a private Ray on this machine or on an existing Ray
cluster."""

import hashlib
import importlib.util
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self, TextIO

from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_client.otlp import require_packages
from kvstore_cluster.arena import require_memory
from kvstore_cluster.catalogue import FileCatalogue, RedisCatalogue
from kvstore_cluster.durability import Durability
from kvstore_cluster.encryption import KeySource
from kvstore_cluster.storage_options import StorageOptions
from kvstore_codec.errors import ServiceError, StartupError
from kvstore_service.cluster_stats import cluster_stats, known_models
from kvstore_service.encryption import open_keys
from kvstore_service.listen import Address, Reservation, two_free_ports
from kvstore_service.local_ray import ESSENTIAL, RayProcesses, local_ray
from kvstore_service.observability.log_follower import LogFollower
from kvstore_service.observability.process_logs import keep_logs
from kvstore_service.ray_cluster import existing_ray, on_this_node
from kvstore_service.ray_messages import reason_of
from kvstore_service.ray_node import joined_ray
from kvstore_service.scratch import scratch_folder
from kvstore_service.security import Security
from kvstore_service.settings import Settings, settings_of
from kvstore_service.storage_actors import Configuration, StorageActors, stop_nodes

log = logging.getLogger(__name__)

_START_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 10.0
_GRACE_S = 1.0
_PID_TIMEOUT_S = 30.0
# Ray restarts a coordinator within seconds. A cluster whose coordinator is silent for longer counts as lost.
_SILENCE_S = 30.0

_ACTOR_OPTIONS = {"max_restarts": -1, "max_task_retries": -1, "max_concurrency": 16}
# Packages of the extra `cluster`. They are imported where they are used, because inference workers do not need them.
_PACKAGES = ("grpc_reflection", "psutil", "ray")
_COORDINATOR_NAME = "kvstore-coordinator"
_OF_STORAGE_NODES = (
    *("memory", "disk", "data_dir", "durability", "policy", "repair_bandwidth", "experiments", "events"),
    *("storage_port", "credentials", "tls_cert", "tls_key", "tls_ca", "tls_client_ca", "tls_name"),
    *("encryption_key_file", "otlp_endpoint"),
)
"""Settings that storage nodes are started with."""


class EmbeddedCluster:
    """Runs a cluster. A context manager; once started, `address` is the coordinator's host:port.

    Without `settings` the cluster is one small node on a free port. The folder `data_dir` contains the nodes' disks,
    and the catalogue unless that is in Redis. If it is None, a temporary folder is used. With `ray_address` the cluster
    runs on that Ray cluster with one storage node on each Ray node, also on those that join later, and `data_dir` is a
    path on each of them.

    The constructor and `start` raise ConfigurationError, AddressInUseError and CatalogueError before Ray starts.
    `start` raises StartupError for later failures, and for missing packages.
    """

    def __init__(self, settings: Settings | None = None) -> None:
        self._settings = settings = settings or settings_of()
        self._listen = Address.parse(settings.listen)
        self.security = Security.of_cluster(settings)
        """How the cluster's servers identify callers."""
        self.security.require_for(self._listen, settings)
        self._connector = (
            self.security.connector()
        )  # goes on with the last good files while others are put in place
        if settings.ray_address is None:  # otherwise nodes are on other machines
            require_memory(settings.memory, nodes=settings.nodes)
        key_file = settings.encryption_key_file
        self._keys = None if key_file is None else partial(open_keys, key_file.absolute())
        if self._keys is not None:
            self._keys()  # a wrong file ends the start here
        self._redis_url = settings.redis.get_secret_value() if settings.redis else None
        self._coordinator: Any = None  # Ray's actor handles know the actors' methods only at run time
        self._storage: dict[str, Any] = {}  # without a Ray cluster
        self._actors: StorageActors | None = None  # with one
        self._running = ExitStack()
        self._ray: RayProcesses | None = None
        self._silent_since_s: float | None = None
        self.address = ""

    @property
    def size(self) -> int:
        """Number of storage nodes."""
        return len(self._handles())

    def start(self) -> None:
        """Starts the cluster. Blocks until every node has joined and clients can connect."""
        _require_packages()
        if self._settings.events is not None:
            _require_zeromq()
        if self._settings.otlp_endpoint is not None:
            require_packages()
        with ExitStack() as started:
            reservation = Reservation(self._listen)
            started.callback(reservation.release)
            scratch = started.enter_context(scratch_folder())
            data_dir = self._settings.data_dir or scratch / "catalogue"
            keys = None if self._keys is None else self._keys()
            _check_catalogue(data_dir, self._redis_url, keys)
            if self._settings.ray_address is None:
                self._ray = started.enter_context(local_ray(scratch / "ray"))
            elif self._settings.ray_join:
                started.enter_context(
                    joined_ray(self._settings.ray_address, reservation.address, scratch / "ray")
                )
            else:
                started.enter_context(existing_ray(self._settings.ray_address))
            started.callback(self._stop_actors)
            wanted = self._settings.events
            events = None if wanted is None else two_free_ports(Address.parse(wanted))
            self._start_actors(data_dir.absolute(), reservation.address, events)
            self._running = started.pop_all()

    def stop(self) -> None:
        """Stops the cluster, and removes its processes and temporary files. May be called more than once."""
        self._running.close()

    def check(self) -> None:
        """Raises ServiceError if the cluster is lost: a Ray process has died, or the coordinator has not answered for
        30 s. Call it every few seconds. After an error, `stop` must still be called."""
        missing = set(ESSENTIAL).difference(self._ray.find()) if self._ray is not None else set()
        if missing:
            self._lost(f"Ray's {' and '.join(sorted(missing))} ended")
        try:
            self.stats()
        except ServiceError:
            now_s = time.monotonic()
            if self._silent_since_s is None:
                self._silent_since_s = now_s
            if now_s - self._silent_since_s >= _SILENCE_S:
                self._lost(f"its coordinator has not answered for {_SILENCE_S:.0f} s")
        else:
            self._silent_since_s = None

    def stats(self) -> pb.ClusterStatsReply:
        """State of the cluster and its nodes. Raises ServiceError if the coordinator does not answer."""
        return cluster_stats(self.address, connector=self._connector)

    def log_follower(self, stream: TextIO) -> LogFollower:
        """What writes the log lines of all processes of the cluster to `stream`, as the settings say."""
        settings = self._settings
        return LogFollower(
            lambda: self.address, self._connector, settings.log_format, settings.log_level, stream
        )

    def models(self) -> dict[str, Any]:
        """Models with a canary, and calibrations, for the status page. Raises ServiceError if the coordinator does not
        answer."""
        return known_models(self.address, self._connector)

    def storage_pids(self) -> dict[str, int]:
        """Process id of each storage node, by node id. Blocks while a node restarts, for at most 30 s; then raises
        Ray's GetTimeoutError."""
        import ray

        handles = self._handles()
        pids = ray.get([node.pid.remote() for node in handles.values()], timeout=_PID_TIMEOUT_S)
        return dict(zip(handles, pids, strict=True))

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _handles(self) -> dict[str, Any]:
        return self._storage if self._actors is None else self._actors.handles

    def _start_actors(self, data_dir: Path, address: Address, events: Address | None) -> None:
        import ray

        settings = self._settings
        start = partial(self._start_storage, data_dir)
        try:
            self._coordinator = self._start_coordinator(data_dir, address, events)
            self.address = _answer(self._coordinator.address.remote(), "the coordinator")
            if settings.ray_address is None:
                # All nodes are on this machine.
                for number in range(settings.nodes):
                    self._storage[f"node-{number}"] = start(f"node-{number}", {"num_cpus": 0})
            else:
                self._actors = StorageActors(
                    start, self._configuration(), self._coordinator, lasting=settings.keep_nodes
                )
                self._actors.place()
                if not self.size:
                    log.warning("no node of the Ray cluster offers a CPU yet, so there is no storage node")
            self._wait_until_joined()
        except ray.exceptions.RayError as error:
            raise StartupError(f"the cluster did not start: {reason_of(error)}") from error
        if self._actors is not None:
            self._actors.watch()

    def _start_coordinator(self, data_dir: Path, address: Address, events: Address | None) -> Any:
        import ray

        from kvstore_cluster.actors.coordinator import CoordinatorActor
        from kvstore_service.grpc_coordinator import serve_coordinator

        on_cluster = self._settings.ray_address is not None
        coordinator = ray.remote(CoordinatorActor).options(
            name=_COORDINATOR_NAME, **_ACTOR_OPTIONS, **(on_this_node() if on_cluster else {"num_cpus": 0})
        )
        deadline_s = time.monotonic() + _START_TIMEOUT_S
        while True:
            try:
                return coordinator.remote(
                    data_dir,
                    partial(serve_coordinator, address=address, security=self.security, events=events),
                    replicas=self._settings.replicas or (2 if on_cluster else 1),
                    redis_url=self._redis_url,
                    isolated=self.security.isolated,
                    events=events is not None,
                    keys=self._keys,
                    prepare=self._keep_logs("coordinator"),
                )
            except ValueError as error:  # the name is taken
                if time.monotonic() > deadline_s:
                    raise StartupError(
                        "another kvstore runs on this Ray cluster, which has room for one; stop it first"
                    ) from error
                time.sleep(0.5)  # Ray notices late that a killed one has ended

    def _start_storage(self, data_dir: Path, name: str, options: Mapping[str, Any]) -> Any:
        import ray

        from kvstore_cluster.actors.storage import StorageActor
        from kvstore_service.peer_nodes import GrpcPeers
        from kvstore_service.storage_server import StorageServer

        settings = self._settings
        return (
            ray.remote(StorageActor)
            .options(**_ACTOR_OPTIONS, **options)
            .remote(
                name,
                self._storage_options(data_dir / "nodes" / name),
                _COORDINATOR_NAME,
                partial(
                    StorageServer,
                    # Without a Ray cluster, nodes listen on the coordinator's host.
                    host=self._listen.host if settings.ray_address is None else None,
                    port=settings.storage_port,
                    security=self.security,
                    otlp_endpoint=settings.otlp_endpoint,
                ),
                partial(GrpcPeers, security=self.security),
                self._keep_logs(name),
                self._configuration(),
            )
        )

    def _configuration(self) -> Configuration:
        """Tells the settings of storage nodes from others. Is not a secret."""
        settings = self._settings.model_dump_json(include=set(_OF_STORAGE_NODES))
        digest = hashlib.sha256(f"{settings} {self.security.node_token}".encode()).hexdigest()
        return version("kvstore-service"), digest

    def _keep_logs(self, component: str) -> Callable[[], None]:
        return partial(keep_logs, component, self._settings.log_format, self._settings.log_level)

    def _storage_options(self, folder: Path) -> StorageOptions:
        settings = self._settings
        return StorageOptions(
            settings.memory,
            settings.disk,
            folder=folder,
            durability=Durability[settings.durability.upper()],
            policy=settings.policy,
            repair_bandwidth_bps=8 * settings.repair_bandwidth,
            experiments=settings.experiments,
            isolated=self.security.isolated,
            events=settings.events is not None,
            keys=self._keys,
        )

    def _wait_until_joined(self) -> None:
        """Waits for all nodes. On a Ray cluster it goes on without those that have broken disks, or need longer to read
        them, unless all have failed. Raises StartupError, and Ray's error of a node."""
        deadline_s = time.monotonic() + _START_TIMEOUT_S
        handles = self._handles()
        if self._actors is None:
            _answer([node.pid.remote() for node in handles.values()], "a storage node")
        while missing := set(handles) - _answer(self._coordinator.live.remote(), "the coordinator").keys():
            if self._actors is not None and missing <= self._actors.ended():
                break
            if time.monotonic() > deadline_s:
                break
            time.sleep(0.02)
        if not missing:
            return
        names = ", ".join(sorted(missing))
        if self._actors is None or set(handles) <= self._actors.ended():
            _answer([handles[name].pid.remote() for name in missing], "a storage node")
            raise StartupError(f"{names} did not join the cluster within {_START_TIMEOUT_S:.0f} s")
        log.warning("%s did not join the cluster yet; a node with a large disk needs some time", names)

    def _lost(self, reason: str) -> NoReturn:
        # `stop` must not wait for actors of a lost cluster; it ends their processes.
        if self._actors is not None:
            self._actors.abandon()
        self._storage, self._actors = {}, None
        self._coordinator = None
        raise ServiceError(f"the cluster at {self.address} is lost: {reason}; start it again")

    def _stop_actors(self) -> None:
        import ray

        if self._coordinator is None:
            return
        try:
            if self._actors is not None:
                self._actors.stop()
            stop_nodes(self._storage)
            ray.get(
                self._coordinator.stop.options(max_task_retries=0).remote(_GRACE_S), timeout=_STOP_TIMEOUT_S
            )
        except ray.exceptions.RayError as error:
            log.warning("the cluster did not stop in order, so its processes are killed: %s", error)
        self._storage, self._actors = {}, None
        self._coordinator = None


def _answer(call: Any, actor: str, timeout_s: float = _START_TIMEOUT_S) -> Any:
    """Result of a call, or a list of calls, made while the cluster starts. Raises StartupError after `timeout_s`."""
    import ray

    try:
        return ray.get(call, timeout=timeout_s)
    except ray.exceptions.GetTimeoutError as error:
        raise StartupError(
            f"the cluster did not start: {actor} did not answer within {timeout_s:g} s; the machine may be overloaded; "
            "try again"
        ) from error


def _require_packages() -> None:
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise StartupError(f"a cluster needs {', '.join(missing)}: pip install 'kvstore-service[cluster]'")


def _require_zeromq() -> None:
    if importlib.util.find_spec("zmq") is None:
        raise StartupError("--events needs pyzmq: pip install 'kvstore-service[events]'")


def _check_catalogue(data_dir: Path, redis_url: str | None, keys: KeySource | None) -> None:
    catalogue = FileCatalogue(data_dir, keys) if redis_url is None else RedisCatalogue(redis_url)
    try:
        catalogue.load()
    finally:
        catalogue.close()
