"""Several Ray nodes on one machine. Each has its own raylet, which can be killed and restarted."""

import json
import os
import signal
import socket
import subprocess
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from kvstore_codec.errors import StartupError
from kvstore_service.listen import Address, Reservation
from kvstore_service.local_ray import prepare_environment
from kvstore_service.ray_node import STARTED, start_ray_node

HEAD = "head"
_HOST = "127.0.0.1"
_START_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 15.0
# Ray's defaults take 13 s to detect a dead node. The timeout of a probe is long, because the machine is busy.
_DETECTION = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 300,
    "health_check_timeout_ms": 2000,
    "health_check_failure_threshold": 3,
}


class RayNodes:
    """A Ray cluster with a head node and named nodes that can be started and killed. A context manager; the head runs
    as long as the block. The head offers no CPU, so storage actors run on the other nodes. Raises StartupError."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._started: dict[str, subprocess.Popen[bytes]] = {}
        self._starts: Counter[str] = Counter()
        self.address = ""

    def start_head(self) -> None:
        prepare_environment()
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "1"
        reservation = Reservation(Address(_HOST, 0))
        self.address = str(reservation.address)
        reservation.release()
        self._start(
            HEAD,
            "--head",
            f"--port={self.address.rpartition(':')[2]}",
            f"--temp-dir={self._folder}",
            "--include-dashboard=false",
            "--no-monitor",
            f"--system-config={json.dumps(_DETECTION)}",
            "--num-cpus=0",
        )
        self._wait_for_head()

    def start(self, name: str) -> None:
        """Starts a node. Blocks until its raylet runs."""
        self._start(name, f"--address={self.address}", "--num-cpus=1")
        deadline_s = time.monotonic() + _START_TIMEOUT_S
        # Nodes start one after the other, because raylets that start at the same time may choose the same port.
        while (self._folder / f"{name}.log").read_bytes().count(STARTED) < self._starts[name]:
            if time.monotonic() > deadline_s or self._started[name].poll() is not None:
                raise StartupError(f"Ray node {name} did not start: {self._last_words(name)}")
            time.sleep(0.05)

    def processes(self, name: str) -> dict[int, str]:
        """Names of a node's processes by process id: `raylet`, `ray::StorageActor`, ..."""
        import psutil

        found: dict[int, str] = {}
        for process in psutil.Process(self._started[name].pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                found[process.pid] = (process.cmdline() or [process.name()])[0].rpartition("/")[2]
        return found

    def wait_until_gone(self, name: str) -> None:
        """Blocks until all processes of the node have ended. Called after its raylet was killed."""
        self._started.pop(name).wait(_STOP_TIMEOUT_S)

    def __enter__(self) -> Self:
        try:
            self.start_head()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Ends the processes of all nodes, those of the head last."""
        for process in reversed(self._started.values()):
            process.terminate()
        for process in reversed(self._started.values()):
            try:
                process.wait(_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        self._started.clear()

    def _start(self, name: str, *arguments: str) -> None:
        self._starts[name] += 1
        with (self._folder / f"{name}.log").open("ab") as log:
            self._started[name] = start_ray_node(_HOST, log, *arguments, f"--node-name={name}")

    def _last_words(self, name: str) -> str:
        """End of a node's log, which is removed with the cluster's folder."""
        lines = (self._folder / f"{name}.log").read_text(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "its log is empty")[-1000:]

    def _wait_for_head(self) -> None:
        host, _, port = self.address.rpartition(":")
        deadline_s = time.monotonic() + _START_TIMEOUT_S
        while True:
            try:
                socket.create_connection((host, int(port)), 1.0).close()
            except OSError as error:
                if time.monotonic() > deadline_s or self._started[HEAD].poll() is not None:
                    raise StartupError(f"Ray did not start: {self._last_words(HEAD)}") from error
                time.sleep(0.1)
            else:
                return
