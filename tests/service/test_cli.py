"""`kvstore` as a user runs it: a process of its own."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.processes import descendants

KVSTORE = [str(Path(sys.executable).with_name("kvstore"))]
READY = re.compile(r"kvstore is ready at (\S+): .*\n")


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*KVSTORE, *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A folder for the temporary files of `kvstore`; its path is short, because Ray's sockets lie below it."""
    folder = Path(tempfile.mkdtemp(prefix="kv"))
    yield folder
    assert list(folder.iterdir()) == []
    folder.rmdir()


@contextmanager
def serving(
    scratch: Path, *arguments: str, listen: str | None = "127.0.0.1:0"
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A running `kvstore serve` in its own session, and its address."""
    listening = () if listen is None else ("--listen", listen)
    process = subprocess.Popen(
        [*KVSTORE, "serve", *listening, "--memory", "16MiB", *arguments],
        env=os.environ | {"TMPDIR": str(scratch)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            ready = READY.fullmatch(line)
            assert ready, (line, process.stderr.read() if process.stderr else "")
            yield process, ready[1]
        finally:
            process.kill()


def refused(result: subprocess.CompletedProcess[str], status: int = 1) -> str:
    """The one line on stderr of a command that failed on purpose."""
    assert result.returncode == status
    assert result.stdout == ""
    assert result.stderr.startswith("kvstore: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


@pytest.mark.slow
def test_serve_status_and_sigterm(tmp_path: Path, scratch: Path) -> None:
    config = tmp_path / "kvstore.toml"
    config.write_text(f'nodes = 2\ndata_dir = "{tmp_path / "data"}"\n')
    with serving(scratch, "--config", str(config)) as (process, address):
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) > 3
        report = json.loads(run("status", "--address", address, "--json").stdout)
        assert report["epoch"] == 2
        assert [(node["node_id"], node["alive"], node["bytes_limit"]) for node in report["nodes"]] == [
            ("node-0", True, 16 << 20),
            ("node-1", True, 16 << 20),
        ]
        assert report["nodes"][0]["counters"]["hits"] == 0
        table = run("status", KVSTORE_ADDRESS=address, COLUMNS="160").stdout
        assert all(text in table for text in (address, "node-0", "node-1", "of 17 MB", "hits"))
        taken = refused(run("serve", "--listen", address, TMPDIR=str(scratch)))
        assert f"cannot listen on {address}" in taken
        second = ("serve", "--listen", "127.0.0.1:0", "--data-dir", str(tmp_path / "data"))
        in_use = refused(run(*second, TMPDIR=str(scratch)))
        assert "in use by another coordinator" in in_use
        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate(timeout=60)
        assert (process.returncode, output, errors) == (0, "", "")
    _, alive = psutil.wait_procs(children, timeout=60)
    assert all(child.status() == psutil.STATUS_ZOMBIE for child in alive)
    assert "no cluster answers" in refused(run("status", "--address", address))


@pytest.mark.slow
def test_control_c_stops_the_whole_session(scratch: Path) -> None:
    with serving(scratch) as (process, _):
        children = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGINT)
        output, errors = process.communicate(timeout=60)
        assert (process.returncode, output, errors) == (0, "", "")
    _, alive = psutil.wait_procs(children, timeout=60)
    assert all(child.status() == psutil.STATUS_ZOMBIE for child in alive)


@pytest.mark.slow
def test_serve_ends_when_its_ray_is_gone(scratch: Path) -> None:
    with serving(scratch) as (process, address):
        children = psutil.Process(process.pid).children(recursive=True)
        (raylet,) = descendants("raylet", process.pid)
        raylet.kill()
        output, errors = process.communicate(timeout=30)
        reason = f"kvstore: the cluster at {address} is lost: Ray's raylet ended; start it again\n"
        assert (process.returncode, output, errors) == (1, "", reason)
    _, alive = psutil.wait_procs(children, timeout=60)
    assert all(child.status() == psutil.STATUS_ZOMBIE for child in alive)


@pytest.mark.slow
def test_serve_ends_when_its_coordinator_cannot_come_back(scratch: Path, tmp_path: Path) -> None:
    with serving(scratch, "--data-dir", str(tmp_path)) as (process, _):
        children = psutil.Process(process.pid).children(recursive=True)
        (coordinator,) = descendants("ray::Coordinat", process.pid)
        (tmp_path / "catalogue.json").write_text("{")
        coordinator.kill()
        output, errors = process.communicate(timeout=60)
        assert (process.returncode, output, errors.count("\n")) == (1, "", 1)
        assert "its coordinator has not answered" in errors
    _, alive = psutil.wait_procs(children, timeout=60)
    assert all(child.status() == psutil.STATUS_ZOMBIE for child in alive)


def test_what_a_signal_makes_of_an_import_is_not_reported() -> None:
    """Python's import fails with a TypeError when the exception of a signal's handler comes in the middle of it."""
    script = """
import os, signal, sys
from kvstore_service.cli.app import app, main
from kvstore_service.signals import Stopped

@app.command()
def interrupted():
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()
    except Stopped:
        raise TypeError("expected a message argument") from None

sys.argv = ["kvstore", "interrupted"]
main()
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (-signal.SIGTERM, "")


def test_a_signal_before_the_command_runs_ends_it_silently() -> None:
    script = "import os, signal; from kvstore_service.cli import app as cli; "
    script += "cli.app = lambda: os.kill(os.getpid(), signal.SIGTERM); cli.main()"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (-signal.SIGTERM, "")


@pytest.mark.slow
@pytest.mark.parametrize("delay_s", [1.0, 2.5, 4.0])
def test_sigterm_while_starting_leaves_nothing(scratch: Path, delay_s: float) -> None:
    command = [*KVSTORE, "serve", "--listen", "127.0.0.1:0", "--memory", "16MiB"]
    environment = os.environ | {"TMPDIR": str(scratch)}
    with subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(delay_s)
        children = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        _, errors = process.communicate(timeout=30)
        # Python itself needs a moment until the command runs.
        assert (process.returncode, errors) in ((0, ""), (-signal.SIGTERM, ""))
    _, alive = psutil.wait_procs(children, timeout=60)
    assert all(child.status() == psutil.STATUS_ZOMBIE for child in alive)


def test_a_port_in_use_is_one_clear_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        assert "Address already in use; stop the process that uses it" in refused(
            run("serve", "--listen", address)
        )
        metrics = refused(
            run("serve", "--listen", "127.0.0.1:0", "--metrics-port", address.rpartition(":")[2])
        )
        assert f"cannot listen on {address}" in metrics


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--memory", "9999TiB"], "lower --memory"),
        (["--memory", "lots"], "--memory: 'lots' is not a size; write for example 4GiB"),
        (["--disk", "4XB"], "--disk: '4XB' is not a size; write for example 4GiB"),
        (
            ["--repair-bandwidth", "fast"],
            "--repair-bandwidth: 'fast' is not a rate in bytes per second; write for example 100MiB",
        ),
        (["--nodes", "0"], "nodes = 0"),
        (["--config", "/nowhere.yaml"], "No such file"),
    ],
)
def test_wrong_settings_are_one_clear_line(arguments: list[str], complaint: str) -> None:
    assert complaint in refused(run("serve", *arguments), status=2)


def test_a_folder_that_cannot_be_written_is_one_clear_line(scratch: Path) -> None:
    tried = run("serve", "--data-dir", "/proc/kvstore", TMPDIR=str(scratch))
    assert "/proc/kvstore cannot be written" in refused(tried)


def test_a_damaged_catalogue_is_refused_and_kept(scratch: Path, tmp_path: Path) -> None:
    catalogue = tmp_path / "catalogue.json"
    catalogue.write_text("{")
    serve = ("serve", "--listen", "127.0.0.1:0", "--data-dir", str(tmp_path))
    line = refused(run(*serve, TMPDIR=str(scratch)))
    assert f"the catalogue {catalogue} is damaged" in line
    assert catalogue.read_text() == "{"


def test_status_without_a_cluster_is_one_clear_line() -> None:
    complaint = refused(run("status", "--address", "127.0.0.1:1"))
    assert complaint == (
        "kvstore: no cluster answers at 127.0.0.1:1; start one with `kvstore serve`, or give another coordinator's "
        "host:port with --address\n"
    )


@pytest.mark.parametrize(
    "arguments", [["--help"], ["serve", "--help"], ["status", "--help"], ["demo", "--help"]]
)
def test_help_needs_neither_ray_nor_torch(arguments: list[str]) -> None:
    code = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in ('ray', 'torch', 'transformers', 'psutil', 'grpc_reflection'):\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "from kvstore_service.cli.app import main\n"
        "main()\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert "Usage" in result.stdout


@pytest.mark.parametrize("missing", ["ray", "psutil", "grpc_reflection"])
def test_serve_without_the_cluster_extra_says_what_to_install(missing: str) -> None:
    code = f"import sys\nsys.modules[{missing!r}] = None\nfrom kvstore_service.cli.app import main\nmain()\n"
    command = [sys.executable, "-c", code, "serve", "--listen", "127.0.0.1:0"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert "pip install 'kvstore-service[cluster]'" in refused(result)
