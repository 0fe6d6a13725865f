"""The doctor on this machine, whatever it has, and on machines made poorer for the occasion."""

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from kvstore_bench.shaping import doctor as shaping_checks
from kvstore_service import doctor, extensions
from kvstore_service.cli.doctor import doctor as command
from kvstore_service.doctor import Finding, services

APP = typer.Typer()
APP.command()(command)


def test_every_check_says_what_is_there_or_why_not_and_what_to_do() -> None:
    checks = doctor.examine()
    assert [check.name for check in checks] == [name for name, _, _ in doctor.checks()]
    for check in checks:
        assert check.detail
        assert check.available or check.remedy, check
    sound = {check.name for check in checks if check.available}
    assert sound >= {"Python", "CPU and memory", "PyTorch", "codec", "client", "slow link in user space"}


def test_json_holds_what_the_table_shows() -> None:
    result = CliRunner().invoke(APP, ["--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["sound"] is True
    assert set(report["checks"][0]) == {"name", "available", "detail", "remedy", "essential"}
    table = CliRunner().invoke(APP, env={"COLUMNS": "200"}).stdout
    for check in report["checks"]:
        assert check["name"] in table


@pytest.mark.parametrize(("essential", "exit_code"), [(True, 1), (False, 0)])
def test_a_check_that_breaks_is_reported_and_only_essential_ones_fail_the_command(
    monkeypatch: pytest.MonkeyPatch, essential: bool, exit_code: int
) -> None:
    def broken() -> Finding:
        raise RuntimeError("libtorch.so: wrong [ELF] class")

    monkeypatch.setattr(doctor, "checks", lambda: (("codec", essential, broken),))
    (check,) = doctor.examine()
    assert (check.name, check.available, check.essential) == ("codec", False, essential)
    assert "RuntimeError: libtorch.so: wrong [ELF] class" in check.detail
    assert check.remedy
    result = CliRunner().invoke(APP, env={"COLUMNS": "200"})
    assert result.exit_code == exit_code
    assert "wrong [ELF] class" in result.stdout


def test_the_table_marks_what_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = Finding(available=False, detail="absent", remedy="none")
    checks = (("CUDA", False, lambda: absent), ("Ray", False, lambda: absent))
    monkeypatch.setattr(doctor, "checks", lambda: checks)
    lines = CliRunner().invoke(APP, env={"COLUMNS": "200"}).stdout.splitlines()
    (cuda,), (ray,) = (
        [line for line in lines if name in line and "absent" in line] for name in ("CUDA", "Ray")
    )
    assert "optional" in cuda
    assert "optional" not in ray


def test_checks_that_cannot_be_imported_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = EntryPoint("shaping", "kvstore_absent.doctor:CHECKS", "kvstore.checks")
    renamed = EntryPoint("renamed", "kvstore_service.doctor:NO_CHECKS", "kvstore.checks")
    monkeypatch.setattr(extensions, "entry_points", lambda **_: [absent, renamed])
    checks = [check for check in doctor.examine() if check.name in {"renamed", "shaping"}]
    assert [(check.name, check.available, check.essential) for check in checks] == [
        ("renamed", False, False),
        ("shaping", False, False),
    ]
    assert "NO_CHECKS" in checks[0].detail
    assert "kvstore_absent" in checks[1].detail
    result = CliRunner().invoke(APP, env={"COLUMNS": "200"})
    assert result.exit_code == 0
    assert "No module named 'kvstore_absent'" in result.stdout
    assert "pip install 'kvstore-service[bench]'" in result.stdout


class SilentServer:
    """Takes connections and says nothing."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self.address = "{}:{}".format(*listener.getsockname())

    def accepted(self) -> int:
        """Connections that clients have made so far."""
        self._listener.settimeout(0)
        count = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                self._listener.accept()[0].close()
                count += 1
        return count


@pytest.fixture
def silent_server() -> Iterator[SilentServer]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield SilentServer(listener)


def test_redis_that_does_not_answer_costs_little_time(
    monkeypatch: pytest.MonkeyPatch, silent_server: SilentServer
) -> None:
    """One connection is made, and given up after a limit of a second."""
    monkeypatch.setenv(services.REDIS_URL, f"redis://:hunter2@{silent_server.address}/0")
    found = services.redis_connection()
    assert silent_server.accepted() == 1
    assert services.REDIS_TIMEOUT_S <= 1
    assert not found.available
    assert silent_server.address in found.detail
    assert "imeout" in found.detail
    assert "hunter2" not in repr(found)


@pytest.mark.parametrize(
    "url",
    [
        "redis://:hunter2/hunter2@127.0.0.1:1/0",  # the slash belongs in no password: it ends the host
        "http://:hunter2@127.0.0.1:1",
        "redis://127.0.0.1:hunter2",
        "hunter2",
    ],
)
def test_a_wrong_redis_url_is_named_without_its_password(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv(services.REDIS_URL, url)
    found = services.redis_connection()
    assert not found.available
    assert services.REDIS_URL in found.detail
    assert "hunter2" not in repr(found)


def test_redis_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(services.REDIS_URL, raising=False)
    found = services.redis_connection()
    assert not found.available
    assert found.remedy is not None
    assert "Not needed" in found.remedy


def test_missing_tools_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    found = shaping_checks.namespace_shaping()
    assert not found.available
    assert "unshare, ip, tc" in found.detail
    assert not services.redis_server().available


def test_a_refused_namespace_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for tool in ("unshare", "ip", "tc"):
        script = tmp_path / tool
        script.write_text("#!/bin/sh\necho unshare: Operation not permitted >&2\nexit 1\n")
        script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    found = shaping_checks.namespace_shaping()
    assert not found.available
    assert "Operation not permitted" in found.detail
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert shaping_checks.namespace_shaping().detail == "needs root"
