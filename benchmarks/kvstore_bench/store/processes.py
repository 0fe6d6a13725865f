"""Processes of measured systems, and what is said to them."""

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
    """Ends with its stdin. What it writes to stderr is kept, to be shown when it fails."""

    def __init__(self, name: str, command: Sequence[str]) -> None:
        self.name = name
        self._said: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, bufsize=0
            )
        except OSError as error:
            self._said.close()
            raise StartupError(f"{name} cannot be started: {error}") from error
        self._stdin = cast("IO[bytes]", self._process.stdin)
        self._stdout = cast("IO[bytes]", self._process.stdout)
        self._unread = b""

    def line(self, timeout_s: float = _START_S) -> str:
        """The next one it prints. Raises StartupError when it does not, or ends."""
        while b"\n" not in self._unread:
            ready, _, _ = select.select([self._stdout], [], [], timeout_s)
            data = self._stdout.read(1 << 20) if ready else b""
            if not data:
                raise self._failed("does not answer" if not ready else "ended")
            self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
        return line.decode()

    def tell(self, command: str, **arguments: Any) -> None:
        try:
            self._stdin.write(json.dumps([command, arguments]).encode() + b"\n")
        except BrokenPipeError as error:
            raise self._failed("ended") from error

    def answer(self, timeout_s: float) -> Any:
        """To what it was told. Raises StartupError when that went wrong."""
        answer = json.loads(self.line(timeout_s))
        if isinstance(answer, dict):
            raise self._failed(answer["error"])
        return answer

    def close(self) -> None:
        self._stdin.close()
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._stdout.close()
        self._said.close()

    def _failed(self, what: str) -> StartupError:
        self._said.seek(0)
        said = self._said.read().decode(errors="replace")[-2000:].strip()
        return StartupError(
            f"the benchmark's process for {self.name} {what}" + (f":\n{said}" if said else "")
        )
