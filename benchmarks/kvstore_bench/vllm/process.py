"""Server processes: vLLM, LMCache's server, stores."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from kvstore_codec.errors import StartupError
from kvstore_service.parent_death import end_with_parent

_STOP_S = 20.0
_POLL_S = 0.1
_SHOWN_CHARACTERS = 1500


class ServerProcess:
    """A server with its child processes, which writes to a log file. It ends with this process, even if that is
    killed. Must be started by a thread that lives as long."""

    def __init__(self, name: str, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
        """Raises StartupError when the program cannot be run."""
        self.name, self._log = name, log
        with log.open("ab") as file:
            try:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,  # some end with it
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env=dict(environment),
                    start_new_session=True,
                    preexec_fn=end_with_parent,
                )
            except OSError as error:
                raise StartupError(f"{name} cannot be started: {error}") from error

    @property
    def pid(self) -> int:
        return self._process.pid

    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def wait_until(self, is_ready: Callable[[], bool], limit_s: float) -> None:
        """Raises StartupError, with the end of the log, when the server ends or is not ready within `limit_s`."""
        deadline = time.monotonic() + limit_s
        while not is_ready():
            if self.has_ended():
                raise StartupError(f"{self.name} ended:\n{self.log_end()}")
            if time.monotonic() > deadline:
                raise StartupError(f"{self.name} was not ready after {limit_s:.0f} s:\n{self.log_end()}")
            time.sleep(_POLL_S)

    def log_end(self) -> str:
        return self._log.read_text(errors="replace")[-_SHOWN_CHARACTERS:].strip()

    def close(self) -> None:
        """Ends the server and its children: with SIGTERM, and after 20 s with SIGKILL."""
        self._signal(signal.SIGTERM)
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            pass
        finally:
            self._signal(signal.SIGKILL)  # also children that have outlived it
            self._process.wait()
            if self._process.stdin is not None:
                self._process.stdin.close()

    def _signal(self, number: signal.Signals) -> None:
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:  # all of them have ended
            return


def free_port(host: str = "127.0.0.1") -> int:
    with socket.socket() as found:
        found.bind((host, 0))
        port: int = found.getsockname()[1]
        return port


def accepts_connections(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), 1).close()
    except OSError:
        return False
    return True
