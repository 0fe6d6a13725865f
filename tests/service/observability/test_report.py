"""`kvstore report`: complete, and without secrets."""

import io
import json
import logging
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvstore_client.logs import LogFormat, LogLevel, RecentLines, install
from kvstore_service.cli.app import app
from kvstore_service.identity import new_token
from kvstore_service.observability import process_logs
from kvstore_service.observability.redaction import REMOVED, Redaction
from tests.service.observability.watched import watched_cluster
from tests.service.secured import SecuredCluster

PLANTED = {
    "KVSTORE_TENANT_SALT": "planted-salt-0123",
    "KVSTORE_REDIS": "redis://operator:planted-password@127.0.0.1:1/0",
    "KVSTORE_MY_PASSWORD": "planted-unknown-variable",
}


@pytest.fixture
def token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A token in a file, and other secrets in the environment."""
    _, made = new_token()
    (tmp_path / "token").write_text(f"{made}\n")
    monkeypatch.setenv("KVSTORE_TOKEN_FILE", str(tmp_path / "token"))
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    return made


@pytest.fixture
def kept_logs(monkeypatch: pytest.MonkeyPatch) -> Iterator[logging.Logger]:
    """This process keeps its log lines, as those of the service do."""
    recent = RecentLines("node-0")
    undo = install(LogFormat.JSON, LogLevel.INFO, stream=io.StringIO(), recent=recent)
    monkeypatch.setattr(process_logs, "_KEPT", [recent])
    yield logging.getLogger("kvstore_service.test")
    undo()


@pytest.fixture
def no_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its checks take seconds."""
    monkeypatch.setattr("kvstore_service.observability.report.examine", list)


def contents(archive: Path) -> dict[str, str]:
    with tarfile.open(archive) as opened:
        return {
            member.name.partition("/")[2]: opened.extractfile(member).read().decode()  # type: ignore[union-attr]
            for member in opened.getmembers()
        }


def report(output: Path, address: str) -> dict[str, str]:
    result = CliRunner().invoke(app, ["report", "--output", str(output), "--address", address])
    assert result.exit_code == 0, (result.output, result.exception)
    assert result.stdout == f"{output}\n"
    return contents(output)


def test_a_report_has_everything_and_no_secret(tmp_path: Path, token: str, kept_logs: logging.Logger) -> None:
    with watched_cluster(tmp_path / "cluster") as cluster:
        kept_logs.warning("somebody logged %s and Bearer abc.def and http://u:pw@host/", token)
        files = report(tmp_path / "report.tar.gz", cluster.address)
    assert set(files) == {
        "versions.json", "settings.json", "doctor.json", "cluster.json", "metrics.prom", "models.json",
        "logs/coordinator.jsonl", "logs/node-0.jsonl", "logs/node-1.jsonl", "missing.json",
    }  # fmt: skip
    assert json.loads(files["missing.json"]) == {}
    whole = "".join(files.values())
    for secret in (token, *PLANTED.values(), "planted-password", "abc.def", "u:pw"):
        assert secret not in whole
    assert json.loads(files["cluster.json"])["health"] == "good"
    assert "kvstore_node_up" in files["metrics.prom"]
    assert json.loads(files["versions.json"])["packages"]["grpcio"]
    settings = json.loads(files["settings.json"])
    shown = {setting["name"]: setting["value"] for setting in settings["of kvstore serve here"]}
    assert shown["redis"] == "hidden"
    assert settings["environment"]["KVSTORE_TENANT_SALT"] == REMOVED
    assert settings["environment"]["KVSTORE_MY_PASSWORD"] == REMOVED
    (line,) = [text for text in files["logs/node-0.jsonl"].splitlines() if "somebody" in text]
    assert json.loads(line)["message"].startswith(f"somebody logged {REMOVED}")
    assert any(check["name"] == "codec" for check in json.loads(files["doctor.json"]))


def test_a_report_of_a_cluster_that_does_not_answer_has_the_rest(
    tmp_path: Path, token: str, unused_port: int, no_doctor: None
) -> None:
    files = report(tmp_path / "report.tar.gz", f"127.0.0.1:{unused_port}")
    assert {"versions.json", "settings.json", "doctor.json", "missing.json"} <= set(files)
    assert "no cluster answers" in json.loads(files["missing.json"])["cluster"]
    assert token not in "".join(files.values())


def test_a_report_overwrites_nothing(tmp_path: Path, unused_port: int) -> None:
    (tmp_path / "there.tar.gz").write_text("mine")
    result = CliRunner().invoke(
        app,
        ["report", "--output", str(tmp_path / "there.tar.gz"), "--address", f"127.0.0.1:{unused_port}"],
    )
    assert "cannot write" in str(result.exception)
    assert (tmp_path / "there.tar.gz").read_text() == "mine"


def test_a_credential_of_one_tenant_sees_no_logs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_doctor: None
) -> None:
    cluster = SecuredCluster(tmp_path)
    try:
        monkeypatch.setenv("KVSTORE_TOKEN", cluster.token("acme"))
        missing = json.loads(report(tmp_path / "report.tar.gz", cluster.front.address)["missing.json"])
        assert {"cluster", "logs"} <= set(missing)
    finally:
        cluster.close()


@pytest.mark.parametrize(
    ("text", "left"),
    [
        (f"kvs_0123456789ab_{'0f' * 32}", REMOVED),
        ("authorization: Bearer x.y", f"authorization: Bearer {REMOVED}"),
        ("redis://me:secret@host:1/2", f"redis://{REMOVED}@host:1/2"),
        ("127.0.0.1:7420 is up", "127.0.0.1:7420 is up"),
    ],
)
def test_what_looks_like_a_secret_is_removed(text: str, left: str) -> None:
    assert Redaction().of(text) == left
