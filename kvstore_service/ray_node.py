"""A Ray node without CPUs that this process adds to a Ray cluster, because Ray's drivers need one on their machine."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from kvstore_codec.errors import StartupError
from kvstore_service.listen import Address
from kvstore_service.local_ray import OBJECT_STORE_BYTES
from kvstore_service.parent_death import end_with_parent
from kvstore_service.ray_cluster import existing_ray, require_answer

STARTED = b"Ray runtime started."
"""What `ray start` prints when its node runs."""
_START_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 15.0


def start_ray_node(host: str, output: BinaryIO, *arguments: str) -> subprocess.Popen[bytes]:
    """Runs `ray start` with these arguments at the IP address `host`, for as long as this process lives. What it
    prints goes to `output`."""
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *arguments),
            f"--node-ip-address={host}",
            f"--object-store-memory={OBJECT_STORE_BYTES}",
            *("--num-gpus=0", "--include-log-monitor=false", "--disable-usage-stats"),
        ],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # so that Ctrl-C reaches only this process, which stops the node
        preexec_fn=end_with_parent,
    )


@contextmanager
def joined_ray(address: str, listen: Address, folder: Path) -> Iterator[None]:
    """Connects this process to the Ray cluster at `address` while the block runs, as a node of its own at the host of
    `listen`, with its files in `folder`. The node ends with this process, even if it is killed. Raises StartupError."""
    require_answer(address)
    host = listen.reachable_host
    folder.mkdir()
    log = folder / "start.log"
    with log.open("wb") as output:
        node = start_ray_node(host, output, f"--address={address}", f"--temp-dir={folder}", "--num-cpus=0")
    try:
        _wait_until_started(node, log)
        with existing_ray(address, host):
            yield
    finally:
        node.terminate()
        try:
            node.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            node.kill()
            node.wait()


def _wait_until_started(node: subprocess.Popen[bytes], log: Path) -> None:
    deadline_s = time.monotonic() + _START_TIMEOUT_S
    while STARTED not in log.read_bytes():
        if node.poll() is not None or time.monotonic() > deadline_s:
            lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
            raise StartupError(f"the Ray node of this machine did not start: {' '.join(lines[-3:])[-1000:]}")
        time.sleep(0.05)
