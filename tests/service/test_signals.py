"""Signals that ask a process to stop, in a process of their own; and what is left of commands that got one."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.processes import descendants
from tests.service.test_cli import KVSTORE, run, serving

BEGIN = """
import atexit, signal, sys, time
from kvstore_service.signals import StopSignals, deferred, end_by
stop = StopSignals()
stop.install()
"""
WAIT = """
try:
    try:
        print("ready", flush=True)
        time.sleep(300)
    finally:
        print("stopping", flush=True)
        sys.stdin.readline()
        print("stopped", flush=True)
except KeyboardInterrupt:
    atexit.register(print, "exit functions", flush=True)
    end_by(stop.received)
"""
# As Ray does.
REPLACE_THEN_WAIT = """
try:
    with deferred():
        print("deferring", flush=True)
        signal.signal(signal.SIGTERM, lambda *_: print("not ours"))
        sys.stdin.readline()
    print("ready", flush=True)
    time.sleep(300)
except KeyboardInterrupt:
    end_by(stop.received)
"""

# A thread that is older than the block takes the signal, and Ray's handler then ends the main thread.
END_IN_A_LIBRARY = """
import threading
threading.Thread(target=time.sleep, args=(300,), daemon=True).start()
try:
    with deferred():
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(number))
        print("deferring", flush=True)
        for _ in range(30_000):  # the main thread sleeps through a signal that another one takes
            time.sleep(0.01)
    print("ready", flush=True)
except KeyboardInterrupt:
    end_by(stop.received)
"""


def begun(code: str, first_line: str) -> "subprocess.Popen[str]":
    """Runs the code until it has printed the line. It goes on from there with a line of input."""
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == first_line
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_the_first_signal_stops_and_later_ones_do_not_disturb(number: signal.Signals) -> None:
    with begun(BEGIN + WAIT, "ready\n") as process:
        process.send_signal(number)
        assert process.stdout is not None
        assert process.stdout.readline() == "stopping\n"
        for other in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            process.send_signal(other)
        assert process.communicate("\n", timeout=20)[0] == "stopped\nexit functions\n"
        assert process.returncode == -number


def test_an_ignored_signal_stays_ignored() -> None:
    ignore = "import signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
    with begun(ignore + BEGIN + WAIT, "ready\n") as process:
        process.send_signal(signal.SIGHUP)
        process.terminate()
        assert process.communicate("\n", timeout=20)[0] == "stopping\nstopped\nexit functions\n"
        assert process.returncode == -signal.SIGTERM  # the first that it heeds


def test_a_signal_while_a_library_starts_comes_after_it_to_us() -> None:
    with begun(BEGIN + REPLACE_THEN_WAIT, "deferring\n") as process:
        process.terminate()
        assert process.communicate("\n", timeout=20)[0] == ""  # before `ready`
        assert process.returncode == -signal.SIGTERM


def test_a_signal_that_a_library_ends_its_caller_with_comes_to_us() -> None:
    with begun(BEGIN + END_IN_A_LIBRARY, "deferring\n") as process:
        process.terminate()
        assert process.communicate(timeout=60)[0] == ""
        assert process.returncode == -signal.SIGTERM


@pytest.fixture
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="kv", dir="/tmp") as folder:
        yield Path(folder)


def folders(scratch: Path) -> set[str]:
    return {path.name for path in scratch.glob("kvstore-*")}


def ignores(pid: int, number: signal.Signals) -> bool:
    """Whether the kernel drops the signal before the process sees it."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (mask,) = (int(line.split()[1], 16) for line in lines if line.startswith("SigIgn:"))
    return bool(mask >> (number - 1) & 1)


def running(processes: list[psutil.Process]) -> list[psutil.Process]:
    _, alive = psutil.wait_procs(processes, timeout=60)
    return [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.slow
@pytest.mark.parametrize("whole_session", [False, True], ids=["process", "closed terminal"])
def test_serve_stops_in_order_on_sighup(scratch: Path, tmp_path: Path, whole_session: bool) -> None:
    with serving(scratch, "--data-dir", str(tmp_path), "--disk", "64MiB") as (process, _):
        children = psutil.Process(process.pid).children(recursive=True)
        (os.killpg if whole_session else os.kill)(process.pid, signal.SIGHUP)
        output, errors = process.communicate(timeout=30)
        assert (process.returncode, output, errors) == (0, "", "")
    assert running(children) == []
    assert folders(scratch) == set()


@pytest.mark.slow
def test_serve_below_nohup_outlives_its_terminal(scratch: Path) -> None:
    with subprocess.Popen(
        ["/usr/bin/nohup", *KVSTORE, "serve", "--listen", "127.0.0.1:0", "--memory", "16MiB"],
        env=os.environ | {"TMPDIR": str(scratch)},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        address = process.stdout.readline().split()[4].rstrip(":")
        os.killpg(process.pid, signal.SIGHUP)
        assert ignores(process.pid, signal.SIGHUP)
        assert run("status", "--address", address).returncode == 0
        assert process.poll() is None
        process.terminate()
        assert process.wait(30) == 0


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("setpriv") is None, reason="only root can be others")
def test_serve_runs_as_a_user_without_name_and_home(scratch: Path) -> None:
    """As containers do with `runAsUser`. That user may read everything, because this Python may lie in root's home."""
    user = 12345
    os.chown(scratch, user, user)
    capability = "-all,+dac_read_search"
    become = [f"--{kind}-caps={capability}" for kind in ("inh", "ambient")]
    environment = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
    with subprocess.Popen(
        [
            *(shutil.which("setpriv") or "", f"--reuid={user}", f"--regid={user}", "--clear-groups", *become),
            *(*KVSTORE, "serve", "--listen", "127.0.0.1:0", "--memory", "16MiB"),
        ],
        cwd="/",
        env=environment | {"TMPDIR": str(scratch)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        line = process.stdout.readline()
        assert "kvstore is ready" in line, process.stderr.read()
        assert psutil.Process(process.pid).uids().effective == user
        process.terminate()
        _, errors = process.communicate(timeout=30)
        assert (process.returncode, errors) == (0, "")


@pytest.mark.slow
def test_what_a_killed_serve_left_is_cleared_by_the_next_one_and_a_living_one_is_let_be(
    scratch: Path,
) -> None:
    with serving(scratch) as (killed, _):
        left = folders(scratch)
        rays = psutil.Process(killed.pid).children(recursive=True)
        with serving(scratch) as (living, address):
            others = psutil.Process(living.pid).children(recursive=True)
            used = folders(scratch) - left
            killed.kill()
            killed.wait()
            with subprocess.Popen(
                [*KVSTORE, "serve", "--listen", "127.0.0.1:0", "--memory", "16MiB"],
                env=os.environ | {"TMPDIR": str(scratch)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            ) as successor:
                assert successor.stdout is not None
                assert "kvstore is ready" in successor.stdout.readline()
                assert running(rays) == []
                assert not left & folders(scratch)
                assert used <= folders(scratch)
                assert run("status", "--address", address).returncode == 0
                assert all(process.is_running() for process in others)
                successor.terminate()
                _, errors = successor.communicate(timeout=30)
                assert f"{scratch / left.pop()} was left by a service that was killed: removed" in errors
            living.terminate()
            assert living.wait(30) == 0
    assert folders(scratch) == set()


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("command", "process_name"),
    [(["faults", "--quick"], "ray::StorageActor"), (["store", "--quick", "--systems", "kvstore"], "python")],
    ids=["faults", "store"],
)
def test_a_terminated_benchmark_ends_what_it_began(
    scratch: Path, tmp_path: Path, command: list[str], process_name: str
) -> None:
    # The token of a user's other Ray clusters, which some of Ray's processes take and others do not.
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("0" * 64)
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    with subprocess.Popen(
        [*KVSTORE, "bench", *command],
        env=inherited | {"TMPDIR": str(scratch), "HOME": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        deadline_s = time.monotonic() + 240
        while not descendants(process_name[:15], process.pid):
            assert process.poll() is None
            assert time.monotonic() < deadline_s
            time.sleep(0.2)
        children = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        _, errors = process.communicate(timeout=60)
        assert process.returncode == -signal.SIGTERM
        assert "SIGTERM received" not in errors
        assert "Traceback" not in errors
    assert running(children) == []
    assert folders(scratch) == set()
