"""The real `kvstore serve` and `kvstore doctor` in environments that others made: compose files, charts, Kubernetes."""

import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kvstore_service import doctor
from kvstore_service.settings import Settings, variable
from tests.service.test_cli import KVSTORE, READY, refused, run, scratch  # noqa: F401 (a fixture)
from tests.service.test_doctor import APP

EMPTY = {variable(name): "" for name in Settings.model_fields}
# As in a pod beside the Services `kvstore` and `kvstore-metrics`.
LINKS = {
    "KVSTORE_METRICS_PORT": "tcp://10.0.0.1:9090",
    "KVSTORE_METRICS_PORT_9090_TCP_ADDR": "10.0.0.1",
    "KVSTORE_METRICS_SERVICE_HOST": "10.0.0.1",
    "KVSTORE_PORT": "tcp://10.0.0.2:7420",
    "KVSTORE_PORT_7420_TCP": "tcp://10.0.0.2:7420",
    "KVSTORE_PORT_7420_TCP_ADDR": "10.0.0.2",
    "KVSTORE_PORT_7420_TCP_PORT": "7420",
    "KVSTORE_PORT_7420_TCP_PROTO": "tcp",
    "KVSTORE_SERVICE_HOST": "10.0.0.2",
    "KVSTORE_SERVICE_PORT": "7420",
    "KVSTORE_SERVICE_PORT_GRPC": "7420",
}


@pytest.mark.slow
def test_serve_starts_beside_services_of_its_name_with_everything_else_empty(
    tmp_path: Path,
    scratch: Path,  # noqa: F811
) -> None:
    process = subprocess.Popen(
        [*KVSTORE, "serve", "--listen", "127.0.0.1:0", "--memory", "16MiB", "--data-dir", "", "--config", ""],
        env=os.environ | EMPTY | LINKS | {"TMPDIR": str(scratch)},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with process:
        try:
            assert process.stdout is not None
            assert READY.fullmatch(process.stdout.readline())
            process.send_signal(signal.SIGTERM)
            _, complaints = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0
    assert list(tmp_path.iterdir()) == []
    (line,) = [line for line in complaints.splitlines() if "KVSTORE_" in line]
    assert "KVSTORE_METRICS_PORT" in line
    assert "enableServiceLinks: false" in line


def test_serve_names_a_wrong_variable_and_what_it_should_be() -> None:
    complaint = refused(run("serve", KVSTORE_METRICS_PORT="http://10.0.0.1:9090"), status=2)
    assert "KVSTORE_METRICS_PORT" in complaint
    assert "integer" in complaint


def test_serve_refuses_a_file_that_is_no_table_in_one_line(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("nodes: " + "[" * 10_000)
    complaint = refused(run("serve", "--config", str(config)), status=2)
    assert "nested too deeply" in complaint
    assert len(complaint) < 500


Report = Callable[..., dict[str, Any]]


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> Report:
    """What `kvstore doctor --json` prints, with the checks that go by the environment alone."""
    given = {"KVSTORE_* variables", "Redis connection"}
    checks = tuple(check for check in doctor.checks() if check[0] in given)
    monkeypatch.setattr(doctor, "checks", lambda: checks)

    def run_doctor(*arguments: str, **variables: str) -> dict[str, Any]:
        result = CliRunner().invoke(APP, ["--json", *arguments], env=variables)
        assert "hunter2" not in result.output
        found: dict[str, Any] = json.loads(result.stdout)
        return found

    return run_doctor


def test_doctor_shows_the_settings_and_their_sources_and_misspelt_variables(
    report: Report, tmp_path: Path
) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("nodes: 2\nredis: redis://:hunter2@127.0.0.1:1/0\n")
    found = report("--config", str(config), KVSTORE_MEMROY="1GiB", KVSTORE_DISK_TIER="ssd", **LINKS)
    settings = {setting["name"]: (setting["value"], setting["source"]) for setting in found["settings"]}
    assert settings["nodes"] == ("2", str(config))
    assert settings["redis"] == ("hidden", str(config))
    (check,) = [check for check in found["checks"] if check["name"] == "KVSTORE_* variables"]
    assert not check["available"]
    assert check["detail"] == "unknown variables: KVSTORE_MEMROY (did you mean KVSTORE_MEMORY?)"


def test_doctor_counts_service_links_and_names_a_port_that_is_no_setting(report: Report) -> None:
    def variables(**given: str) -> dict[str, Any]:
        checks = report(**given)["checks"]
        return next(check for check in checks if check["name"] == "KVSTORE_* variables")

    links = {name: value for name, value in LINKS.items() if name != "KVSTORE_METRICS_PORT"}
    assert variables(**links)["available"]
    assert f"; {len(links)} service links of Kubernetes are ignored" in variables(**links)["detail"]
    found = variables(**links | {"KVSTORE_PORT": "7421"})
    assert not found["available"]
    assert found["detail"] == "KVSTORE_PORT=7421 is not a setting; use KVSTORE_LISTEN"


def test_serve_names_a_port_that_is_no_setting() -> None:
    result = run("serve", "--data-dir", "/proc/kvstore", KVSTORE_PORT="7421")
    assert result.stderr.startswith("kvstore: KVSTORE_PORT=7421 is not a setting; use KVSTORE_LISTEN\n")


def test_doctor_says_that_serve_would_not_start(report: Report) -> None:
    found = report(KVSTORE_NODES="none")
    assert found["settings"] == []
    assert found["checks"][-1]["name"] == "settings"
    assert "KVSTORE_NODES" in found["checks"][-1]["detail"]


def test_doctor_and_serve_read_the_same_variable(report: Report) -> None:
    found = report(KVSTORE_REDIS="redis://127.0.0.1:1/0")
    (check,) = [check for check in found["checks"] if check["name"] == "Redis connection"]
    assert "127.0.0.1:1 does not answer" in check["detail"]
