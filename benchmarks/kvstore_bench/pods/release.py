"""A release of the chart that runs on this machine."""

import copy
import fcntl
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from kvstore_bench.pods.container import container_of, replacing
from kvstore_bench.pods.manifests import NAMESPACE, Manifest, Manifests
from kvstore_bench.pods.pod import Pod
from kvstore_bench.pods.valkey import valkey_server
from kvstore_codec.errors import StartupError
from kvstore_service.ray_node import STARTED

RELEASE = "kv"
_REDIS_PORT = 6380
"""Redis' port here. Ray's head listens at Redis' usual port of all addresses of the machine."""
_FIRST_HOST = 10


class Release:
    """The pods of the chart with `values`, with their files in `folder`, whose path must be short. A context manager,
    which stops all pods. Pods are started one by one: Kubernetes would start all at once, and restart those that fail
    until what they wait for is there. There is one release at a time on a machine, because Ray's head listens at all of
    its addresses; another one waits.

    Raises StartupError for pods that do not start."""

    def __init__(self, folder: Path, values: Mapping[str, Any]) -> None:
        self.manifests = Manifests(RELEASE, values)
        self._folder = folder
        self._network = f"127.{os.getpid() % 200 + 20}.0"
        self._hosts = itertools.count(_FIRST_HOST)
        self._addresses: dict[str, str] = {}
        self.pods: dict[str, Pod] = {}
        self._starts = itertools.count()
        self._turn = ExitStack()
        _provide_programs(folder)

    def upgrade(self, values: Mapping[str, Any]) -> None:
        """Later pods are those of the chart with these values. Secrets stay, as Helm's `lookup` lets them."""
        before = self.manifests
        self.manifests = Manifests(RELEASE, values)
        kept = {manifest["metadata"]["name"] for manifest in before.of("Secret")}
        self.manifests.all = [
            manifest
            for manifest in self.manifests.all
            if manifest["kind"] != "Secret" or manifest["metadata"]["name"] not in kept
        ] + before.of("Secret")

    def address(self, component: str) -> str:
        """Address of the first pod of a component."""
        return self._address(self.manifests.workload(component).pod(0))

    def start(self, component: str, ordinal: int = 0) -> Pod:
        """Starts a pod, without waiting for it."""
        workload = self.manifests.workload(component)
        name = workload.pod(ordinal)
        folder = self._folder / f"p{next(self._starts)}"
        folder.mkdir()
        address = self._address(name)
        spec = _with_redis_port(workload.spec) if component == "redis" else workload.spec
        # Other programs may use the machine's other addresses.
        hosts = self._services() | {"0.0.0.0": address}  # noqa: S104
        container = container_of(
            self.manifests, spec, name, address, self._folder / "root", folder / "t", hosts
        )
        pod = self.pods[name] = Pod(name, address, spec, container, folder)
        return pod

    def run(self, component: str) -> tuple[int, str]:
        """Runs a pod that ends by itself. Returns its exit status and what it has written."""
        pod = self.start(component)
        status = pod.wait(120)
        text = pod.log.read_text(errors="replace")
        pod.kill()
        return status, text

    def pod(self, component: str, ordinal: int = 0) -> Pod:
        return self.pods[self.manifests.workload(component).pod(ordinal)]

    def client_settings(self) -> dict[str, str]:
        """Settings of a worker, as the chart's ConfigMap and notes say."""
        folder = self._folder / "client"
        folder.mkdir(exist_ok=True)
        secrets = [self.manifests.files("Secret", name) for name in self._names_of("Secret", "-auth", "-tls")]
        for key, path in (("worker-token", "token"), ("ca.crt", "ca.crt")):
            for files in secrets:
                if key in files:
                    (folder / path).write_bytes(files[key])
        (name,) = self._names_of("ConfigMap", "-client")
        placed = replacing({"/etc/kvstore": folder}, self._services())
        settings = self.manifests.files("ConfigMap", name)
        return {
            key.removeprefix("KVSTORE_").lower(): placed(value.decode()) for key, value in settings.items()
        }

    def start_all(self, patience_s: float = 90.0) -> None:
        """Starts all pods that serve, and waits until they are ready."""
        for component in ("redis", "head", "gateway", "storage"):
            try:
                workload = self.manifests.workload(component)
            except KeyError:
                continue
            for ordinal in range(workload.replicas):
                pod = self.start(component, ordinal)
                if component == "storage":
                    # Ray nodes of one machine that start at the same time may choose the same ports.
                    _wait_for_ray(pod, patience_s)
                else:
                    pod.wait_until("startup", patience_s)
        for pod in self.pods.values():
            pod.wait_until("readiness", patience_s)

    def __enter__(self) -> Self:
        lock = self._turn.enter_context((Path(tempfile.gettempdir()) / "kvstore-pods.lock").open("w"))
        fcntl.flock(lock, fcntl.LOCK_EX)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pod in reversed(self.pods.values()):
            pod.kill()
        self._turn.close()

    def _address(self, pod: str) -> str:
        if pod not in self._addresses:
            self._addresses[pod] = f"{self._network}.{next(self._hosts)}"
        return self._addresses[pod]

    def _names_of(self, kind: str, *endings: str) -> list[str]:
        names = [manifest["metadata"]["name"] for manifest in self.manifests.of(kind)]
        return [name for name in names if name.endswith(endings)]

    def _services(self) -> dict[str, str]:
        """Addresses by the names of Services: of the first pod that each selects."""
        found: dict[str, str] = {}
        for service in self.manifests.of("Service"):
            component = service["spec"]["selector"]["app.kubernetes.io/component"]
            name = service["metadata"]["name"]
            for host in (
                name,
                f"{name}.{NAMESPACE}",
                f"{name}.{NAMESPACE}.svc",
                f"{name}.{NAMESPACE}.svc.cluster.local",
            ):
                if component == "redis":
                    found[f"{host}:6379"] = f"{self.address(component)}:{_REDIS_PORT}"
                else:
                    found[host] = self.address(component)
        return found


def _with_redis_port(spec: Manifest) -> Manifest:
    spec = copy.deepcopy(spec)
    (container,) = spec["containers"]
    container["command"] += ["--port", str(_REDIS_PORT)]
    container["ports"][0]["containerPort"] = _REDIS_PORT
    return spec


def _wait_for_ray(pod: Pod, patience_s: float) -> None:
    deadline_s = time.monotonic() + patience_s
    while STARTED not in pod.log.read_bytes():
        if not pod.is_running or time.monotonic() > deadline_s:
            raise StartupError(f"{pod.name} did not start: {pod.last_words()}")
        time.sleep(0.1)


def _provide_programs(folder: Path) -> None:
    """Puts the programs of the images into a folder that is first in PATH: those of this Python, and Valkey's server,
    which may be Redis' here."""
    programs = folder / "bin"
    programs.mkdir()
    (programs / "valkey-server").symlink_to(valkey_server())
    os.environ["PATH"] = os.pathsep.join(
        (str(programs), str(Path(sys.executable).parent), os.environ["PATH"])
    )
