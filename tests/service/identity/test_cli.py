"""`kvstore credentials`: adding, listing and revoking."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kvstore_codec.errors import ConfigurationError, KVStoreError, UnauthenticatedError
from kvstore_service.cli.app import app
from kvstore_service.identity.file import read_credentials


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "credentials.json"


def kvstore(file: Path, command: str, *arguments: str) -> Any:
    result = CliRunner().invoke(app, ["credentials", command, *arguments, "--file", str(file)])
    if isinstance(result.exception, KVStoreError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result


def test_a_token_is_shown_once_and_alone_on_stdout(file: Path) -> None:
    token = kvstore(file, "add", "worker", "--tenant", "acme").stdout.strip()
    caller = read_credentials(file).of_token(token)
    assert (caller.name, caller.tenant, caller.scopes) == ("worker", "acme", {"data"})
    shown = kvstore(file, "list").output
    assert "worker" in shown
    assert token.split("_")[2] not in shown + file.read_text()


def test_a_token_is_rotated_by_adding_one_and_revoking_the_other(file: Path) -> None:
    old = json.loads(kvstore(file, "add", "worker", "--json").stdout)
    new = json.loads(kvstore(file, "add", "worker", "--expires", "90d", "--json").stdout)
    assert read_credentials(file).of_token(old["token"]).name == "worker"
    assert kvstore(file, "revoke", "--id", old["id"]).output == f"revoked {old['id']} of worker\n"
    assert read_credentials(file).of_token(new["token"]).name == "worker"
    with pytest.raises(UnauthenticatedError):
        read_credentials(file).of_token(old["token"])
    (left,) = json.loads(kvstore(file, "list", "--json").stdout)["credentials"]
    assert (left["id"], left["expired"]) == (new["id"], False)
    assert "token" not in left


def test_revoking_a_name_ends_all_its_credentials(file: Path) -> None:
    for name in ("worker", "worker", "ops"):
        kvstore(file, "add", name, "--tenant", "*", "--scope", "admin", "--scope", "data")
    kvstore(file, "revoke", "worker")
    (left,) = read_credentials(file)
    assert (left.name, left.tenant, left.scopes) == ("ops", None, {"admin", "data"})


def test_prometheus_gets_a_credential_that_only_reads(file: Path) -> None:
    token = kvstore(file, "add", "prometheus", "--tenant", "*", "--scope", "metrics").stdout.strip()
    assert read_credentials(file).of_token(token).scopes == {"metrics"}
    with pytest.raises(ConfigurationError, match="serves every tenant"):
        kvstore(file, "add", "prometheus", "--tenant", "acme", "--scope", "metrics")


def test_a_certificate_needs_no_token(file: Path) -> None:
    added = kvstore(file, "add", "node", "--tenant", "*", "--scope", "node", "--subject", "node.example")
    assert "certificates with the subject node.example" in added.output
    assert read_credentials(file).of_certificate(["node.example"]).name == "node"
    assert "certificate node.example" in kvstore(file, "list").output


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("add", "worker", "--scope", "root"), "scopes are data, admin, node"),
        (("add", "worker", "--expires", "soon"), "for example 90d"),
        (("add", "worker", "--expires", "0d"), "for example 90d"),
        (("add", "a worker"), "name of a credential"),
        (("revoke",), "NAME, --id"),
        (("revoke", "nobody"), "credentials add"),
        (("list",), "credentials add"),
    ],
)
def test_a_wrong_argument_is_refused_and_changes_nothing(
    file: Path, arguments: tuple[str, ...], says: str
) -> None:
    with pytest.raises(ConfigurationError, match=says):
        kvstore(file, *arguments)
    assert not file.exists()


def test_revoking_an_unknown_name_says_so(file: Path) -> None:
    kvstore(file, "add", "worker")
    with pytest.raises(ConfigurationError, match="has no credential 'nobody'"):
        kvstore(file, "revoke", "nobody")
