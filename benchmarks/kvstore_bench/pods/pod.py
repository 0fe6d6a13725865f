"""A pod that runs as a process of this machine."""

import shutil
import signal
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import psutil
from grpc_health.v1 import health_pb2

from kvstore_bench.pods.container import Container
from kvstore_codec.errors import StartupError
from kvstore_service.cluster_stats import serving_status
from kvstore_service.parent_death import end_with_parent

_POD = "KVSTORE_BENCH_POD"
"""Every process of a pod has this variable, with the pod's folder."""


class Pod:
    """Runs from construction until `stop`. `spec` is the pod's specification."""

    def __init__(
        self, name: str, address: str, spec: dict[str, Any], container: Container, folder: Path
    ) -> None:
        self.name, self.address = name, address
        (self._spec,) = spec["containers"]
        self._grace_s: float = spec.get("terminationGracePeriodSeconds", 30)
        self._container, self._folder = container, folder
        self._environment = container.environment | {_POD: str(folder)}
        self.log = folder / "log"
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                container.command,
                env=self._environment,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=end_with_parent,
            )

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def probe(self, kind: str) -> bool:
        """Whether the startup, readiness or liveness probe succeeds."""
        probe = self._spec[f"{kind}Probe"]
        patience_s = probe.get("timeoutSeconds", 1)
        if "exec" in probe:
            return self.run(probe["exec"]["command"], patience_s).returncode == 0
        if "grpc" in probe:
            return self._serves(probe["grpc"]["port"], probe["grpc"].get("service", ""), patience_s)
        try:
            port = self._port(probe["tcpSocket"]["port"])
            socket.create_connection((self.address, port), patience_s).close()
        except OSError:
            return False
        return True

    def wait_until(self, kind: str, patience_s: float = 90.0) -> float:
        """Waits until a probe succeeds, and returns the seconds that took. Raises StartupError."""
        began_s = time.monotonic()
        while not self.probe(kind):
            if not self.is_running or time.monotonic() - began_s > patience_s:
                raise StartupError(f"the {kind} probe of {self.name} fails: {self.last_words()}")
            time.sleep(0.2)
        return time.monotonic() - began_s

    def run(self, command: list[str], timeout_s: float) -> subprocess.CompletedProcess[str]:
        """Runs a command in the container. One that takes longer than `timeout_s` counts as failed."""
        arguments = self._container.expanded(command)
        try:
            return subprocess.run(
                arguments,
                env=self._environment,
                capture_output=True,
                text=True,
                timeout=timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return subprocess.CompletedProcess(arguments, 124, "", f"took longer than {timeout_s} s")

    def wait(self, timeout_s: float) -> int:
        """Waits for the end of the container, and returns its exit status."""
        return self._process.wait(timeout_s)

    def stop(self) -> float:
        """Stops the pod as Kubernetes does: the hook, SIGTERM, and SIGKILL at the end of the grace period. Returns the
        seconds that took."""
        began_s = time.monotonic()
        hook = self._spec.get("lifecycle", {}).get("preStop", {}).get("exec")
        if hook is not None and self.is_running:
            self.run(hook["command"], self._grace_s)
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(max(1.0, self._grace_s - (time.monotonic() - began_s)))
        self.kill()
        return time.monotonic() - began_s

    def kill(self) -> None:
        """Ends all processes of the pod at once, as when its machine is lost, and removes its folder."""
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get(_POD) == str(self._folder):
                    process.send_signal(signal.SIGKILL)
        self._process.kill()  # Redis writes its title over its environment
        self._process.wait()
        log = self.log.read_bytes()
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(exist_ok=True)
        self.log.write_bytes(log)

    def last_words(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()
        return " | ".join(line.strip() for line in lines[-8:] if line.strip())[-1500:] or "its log is empty"

    def _serves(self, port: int, service: str, timeout_s: float) -> bool:
        with grpc.insecure_channel(f"{self.address}:{port}") as channel:
            try:
                status = serving_status(channel, service, timeout_s)
            except grpc.RpcError:
                return False
        return bool(status == health_pb2.HealthCheckResponse.SERVING)

    def _port(self, port: int | str) -> int:
        if isinstance(port, int):
            return port
        return next(int(each["containerPort"]) for each in self._spec["ports"] if each["name"] == port)
