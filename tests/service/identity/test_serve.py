"""`kvstore serve` with credentials and TLS, and what it listens on without options."""

import json
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.authority import Authority
from tests.service.test_cli import refused, run, scratch, serving

__all__ = ["scratch"]

pytestmark = pytest.mark.slow


def end(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0


def test_a_served_cluster_is_for_those_with_a_credential(scratch: Path, tmp_path: Path) -> None:
    file = tmp_path / "credentials.json"
    authority = Authority(tmp_path / "files")
    pair = authority.sign("server")
    tokens = {
        name: run("credentials", "add", name, "--file", str(file), *arguments).stdout.strip()
        for name, arguments in {
            "worker": ("--tenant", "acme"),
            "ops": ("--tenant", "*", "--scope", "admin"),
        }.items()
    }
    files = ("--tls-cert", str(pair.certificate), "--tls-key", str(pair.key))
    own = ("--tls-ca", str(authority.certificate), "--credentials", str(file), "--nodes", "2")
    with serving(scratch, *files, *own) as (process, address):
        known = {"KVSTORE_TLS_CA": str(authority.certificate), "KVSTORE_ADDRESS": address}
        status = json.loads(run("status", "--json", KVSTORE_TOKEN=tokens["ops"], **known).stdout)
        assert [node["alive"] for node in status["nodes"]] == [True, True]
        assert "the scope admin" in refused(run("status", KVSTORE_TOKEN=tokens["worker"], **known), 1)
        assert "needs a credential" in refused(run("ls", **known), 1)
        assert json.loads(run("ls", "--json", KVSTORE_TOKEN=tokens["worker"], **known).stdout)["chunks"] == []
        run("credentials", "revoke", "worker", "--file", str(file))
        deadline_s = time.monotonic() + 30
        while run("ls", KVSTORE_TOKEN=tokens["worker"], **known).returncode == 0:
            assert time.monotonic() < deadline_s
        end(process)


def test_without_options_everything_listens_on_the_loopback(scratch: Path) -> None:
    with serving(scratch, "--nodes", "2") as (process, _):
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        listening = {
            (member.name(), connection.laddr.ip.removeprefix("::ffff:"))
            for member in family
            for connection in member.net_connections("inet")
            if connection.status == psutil.CONN_LISTEN
        }
        assert listening
        assert {host for _, host in listening} <= {"127.0.0.1", "::1"}, listening
        end(process)
