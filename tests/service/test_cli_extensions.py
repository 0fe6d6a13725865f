"""Commands that other packages add to `kvstore`."""

from importlib.metadata import EntryPoint

import pytest
import typer
from typer.testing import CliRunner

from kvstore_codec.errors import StartupError
from kvstore_service.cli import extensions
from kvstore_service.cli.app import app


def test_the_measuring_equipment_adds_its_commands() -> None:
    shown = CliRunner().invoke(app, ["--help"]).stdout
    for name in ("bench", "demo", "tune"):
        assert f" {name} " in shown
    assert CliRunner().invoke(app, ["bench", "codec", "--help"]).exit_code == 0


def test_a_command_that_cannot_be_imported_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = EntryPoint("bench", "kvstore_absent.cli:bench", "kvstore.commands")
    monkeypatch.setattr(extensions, "entry_points", lambda **_: [absent])
    bare = typer.Typer()
    bare.command("status")(lambda: print("sound"))
    extensions.add_extensions(bare)
    assert CliRunner().invoke(bare, ["status"]).stdout == "sound\n"
    for arguments in (["bench"], ["bench", "codec", "--quick"], ["bench", "--help"]):
        error = CliRunner().invoke(bare, arguments).exception
        assert isinstance(error, StartupError)
        assert "kvstore_absent" in str(error)
        assert "pip install 'kvstore-service[bench]'" in str(error)


def test_the_former_name_of_a_command_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extensions, "entry_points", lambda **_: [])
    result = CliRunner().invoke(app, ["calibrate", "--model", "smollm2", "--ratio"])
    assert isinstance(result.exception, StartupError)
    assert "kvstore tune is not installed" in str(result.exception)
