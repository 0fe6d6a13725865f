"""Starts server and client processes of measured systems, and sends them commands."""

import json
import select
import subprocess
import tempfile
from collections.abc import Sequence
from typing import IO, Any, cast

from kvstore_codec.errors import StartupError

_START_S = 120.0
_STOP_S = 10.0


class Process:
    """A process that runs until `close` ends its stdin. Its stderr becomes part of the error when it fails. Raises
    StartupError when it cannot be started."""

    def __init__(self, name: str, command: Sequence[str]) -> None:
        self.name = name
        self._stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr, bufsize=0
            )
        except OSError as error:
            self._stderr.close()
            raise StartupError(f"cannot start {name}: {error}") from error
        self._stdin = cast("IO[bytes]", self._process.stdin)
        self._stdout = cast("IO[bytes]", self._process.stdout)
        self._unread = b""

    def line(self, timeout_s: float = _START_S) -> str:
        """The next line of its stdout. Raises StartupError when none comes within `timeout_s`, or the process ends."""
        while b"\n" not in self._unread:
            ready, _, _ = select.select([self._stdout], [], [], timeout_s)
            data = self._stdout.read(1 << 20) if ready else b""
            if not data:
                raise self._failed("ended" if ready else f"did not answer within {timeout_s:g} s")
            self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
        return line.decode()

    def tell(self, command: str, **arguments: Any) -> None:
        """Sends a command. Raises StartupError when the process has ended."""
        try:
            self._stdin.write(json.dumps([command, arguments]).encode() + b"\n")
        except BrokenPipeError as error:
            raise self._failed("ended") from error

    def answer(self, timeout_s: float) -> Any:
        """The answer to the oldest unanswered command. Raises StartupError when the command failed."""
        answer = json.loads(self.line(timeout_s))
        if isinstance(answer, dict):
            raise self._failed(answer["error"])
        return answer

    def close(self) -> None:
        """Ends the process, and kills it after 10 s. Blocks until it has ended."""
        self._stdin.close()
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._stdout.close()
        self._stderr.close()

    def _failed(self, what: str) -> StartupError:
        self._stderr.seek(0)
        stderr = self._stderr.read().decode(errors="replace")[-2000:].strip()
        return StartupError(
            f"the benchmark's process for {self.name} {what}" + (f":\n{stderr}" if stderr else "")
        )
