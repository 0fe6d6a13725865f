"""A private Ray cluster on this machine. It is small, prints nothing, and leaves no processes or files."""

import logging
import os
import secrets
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from kvstore_codec.errors import StartupError
from kvstore_service import signals
from kvstore_service.ray_messages import silent_ray

if TYPE_CHECKING:
    import psutil

# Read by Ray when it is imported or started.
ENVIRONMENT = {
    # A local cluster sends no usage reports, and listens on this machine only.
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
# Keeps other users of this machine out: Ray's processes refuse calls without the token (Ray 2.52 or newer; earlier ones
# ignore these variables). Only this user can read the environment of a process. There is one token in the life of a
# process, because Ray reads it once, when it is first used: a process that has used Ray before goes on without one.
_AUTH_MODE = "RAY_AUTH_MODE"
_AUTH_ENVIRONMENT = {_AUTH_MODE: "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
# Ray carries control calls only, so its object store is as small as Ray allows.
OBJECT_STORE_BYTES = 80 << 20
_STOP_TIMEOUT_S = 5.0
# The Ray processes that a cluster needs.
ESSENTIAL = ("gcs_server", "raylet")


def prepare_environment() -> None:
    """Sets what Ray reads when it is imported and started, in this process and in those that it starts. Called before
    `import ray`, because later some of it has no effect."""
    os.environ.update(ENVIRONMENT)
    if "ray" not in sys.modules:
        os.environ.update(_AUTH_ENVIRONMENT)
    else:
        # Without a mode Ray 2.60 decides by a file in the user's home, makes that file, and some of its processes find
        # a token there that others do not have.
        os.environ.setdefault(_AUTH_MODE, "disabled")


@contextmanager
def local_ray(folder: Path) -> Iterator["RayProcesses"]:
    """Runs Ray with its files in `folder`. Ray's processes end with this process, even if it is killed.

    Ray's failure detection keeps its slow defaults: with a single Ray node, faster settings only end the whole cluster
    when the machine is busy. The coordinator watches the storage nodes instead.

    Raises StartupError.
    """
    prepare_environment()
    import ray

    if ray.is_initialized():
        raise StartupError("Ray already runs in this process; start the cluster in a process without Ray")
    patience_s = 0.0
    processes = RayProcesses(folder)
    with silent_ray():
        try:
            _start(folder)
            patience_s = _STOP_TIMEOUT_S
            yield processes
        finally:
            # Also after a signal interrupts the start, because Ray does not end processes of an unfinished start.
            processes.find()
            ray.shutdown()
            processes.wait_until_gone(patience_s)


class RayProcesses:
    """The processes of the Ray in `folder` that `find` has found. They are remembered, because the children of a dead
    raylet are no longer descendants of this process, and nothing else would end them."""

    def __init__(self, folder: Path) -> None:
        self._folder = str(folder)
        self._seen: set[psutil.Process] = set()

    def find(self) -> list[str]:
        """Finds Ray's processes, and returns the names of those in ESSENTIAL that run."""
        import psutil

        running = []
        for child in psutil.Process().children():
            with suppress(psutil.NoSuchProcess):
                if child.status() == psutil.STATUS_ZOMBIE or not any(
                    self._folder in argument for argument in child.cmdline()
                ):
                    continue
                self._seen |= {child, *child.children(recursive=True)}
                running += [name for name in ESSENTIAL if name in child.name()]
        return running

    def wait_until_gone(self, patience_s: float) -> None:
        """Blocks until all processes that were found have ended. Kills those still alive after `patience_s`."""
        import psutil

        deadline_s = time.monotonic() + patience_s
        for process in self._seen:
            with suppress(psutil.NoSuchProcess):
                while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                    if time.monotonic() > deadline_s:
                        process.kill()
                    time.sleep(0.02)


def _start(folder: Path) -> None:
    import ray

    try:
        with signals.deferred():
            ray.init(
                address="local",
                num_cpus=0,
                num_gpus=0,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                object_store_memory=OBJECT_STORE_BYTES,
                namespace="kvstore",
                _temp_dir=str(folder),
                # Ray's defaults are those for tasks. Actors yield to all other processes, so nodes beside a busy engine
                # would answer late. And Ray kills actors when others have filled the machine's memory.
                _system_config={"worker_niceness": 0, "memory_monitor_refresh_ms": 0},
            )
    except Exception as error:  # Ray raises a plain Exception if the start takes too long
        raise StartupError(f"Ray did not start: {error}") from error
