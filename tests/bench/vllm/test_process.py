"""Server processes."""

import os
import sys
from pathlib import Path

import psutil
import pytest

from kvstore_bench.vllm.process import ServerProcess, accepts_connections, free_port
from kvstore_codec.errors import StartupError

SERVE = "import socket, sys, time; s = socket.create_server(('127.0.0.1', int(sys.argv[1]))); time.sleep(60)"
WITH_A_CHILD = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {SERVE!r}, sys.argv[1]])"


def test_children_end_with_the_server(tmp_path: Path) -> None:
    port = free_port()
    command = (sys.executable, "-c", WITH_A_CHILD, str(port))
    process = ServerProcess("server", command, tmp_path / "log", os.environ)
    process.wait_until(lambda: accepts_connections("127.0.0.1", port), 30)
    (child,) = psutil.Process(process.pid).children()
    process.close()
    assert process.has_ended()
    child.wait(60)
    assert not accepts_connections("127.0.0.1", port)


def test_a_server_that_ends_says_why(tmp_path: Path) -> None:
    command = (sys.executable, "-c", "raise SystemExit('no model')")
    process = ServerProcess("server", command, tmp_path / "log", os.environ)
    with pytest.raises(StartupError, match="server ended:\nno model"):
        process.wait_until(lambda: False, 30)
    process.close()


def test_a_server_that_is_never_ready_is_given_up(tmp_path: Path) -> None:
    process = ServerProcess("server", ("sleep", "60"), tmp_path / "log", os.environ)
    with pytest.raises(StartupError, match="not ready after 0 s"):
        process.wait_until(lambda: False, 0.2)
    process.close()


def test_a_program_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="cannot be started"):
        ServerProcess("server", ("/nowhere/python",), tmp_path / "log", os.environ)
