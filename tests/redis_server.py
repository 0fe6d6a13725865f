"""A real Redis (or Valkey) in a process of its own."""

import signal
import socket
import subprocess
import tempfile
import time
from typing import Self

import redis

from kvstore_bench.pods.valkey import valkey_server

PASSWORD = "a/secret#word"  # noqa: S105 (of the test's own server)


class RedisServer:
    """Context manager. Keeps nothing on disk, so a restart is a wipe."""

    def __init__(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"redis://:{PASSWORD.replace('/', '%2F').replace('#', '%23')}@127.0.0.1:{self.port}/0"
        self._folder = tempfile.TemporaryDirectory(prefix="kvstore-redis-")

    def start(self) -> None:
        options = ("--bind", "127.0.0.1", "--requirepass", PASSWORD, "--save", "", "--dir", self._folder.name)
        self._process = subprocess.Popen(
            [valkey_server(), "--port", str(self.port), *options], stdout=subprocess.DEVNULL
        )
        deadline_s = time.monotonic() + 20
        with self.client() as client:
            while True:
                try:
                    client.ping()
                except redis.ConnectionError:
                    assert time.monotonic() < deadline_s
                    time.sleep(0.02)
                else:
                    return

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def hang(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def client(self) -> redis.Redis:
        return redis.Redis.from_url(self.url)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._folder.cleanup()
