"""Commands that other packages add to `kvstore`."""

import inspect
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from kvstore_bench.cli.tune import tune
from kvstore_codec.errors import ConfigurationError, StartupError
from kvstore_service import extensions
from kvstore_service.cli.app import app
from kvstore_service.cli.borrowed_options import options_of
from kvstore_service.cli.extensions import add_extensions
from kvstore_service.cli.signatures import add_options


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
    add_extensions(bare)
    assert CliRunner().invoke(bare, ["status"]).stdout == "sound\n"
    for arguments in (["bench"], ["bench", "codec", "--quick"], ["bench", "--help"]):
        error = CliRunner().invoke(bare, arguments).exception
        assert isinstance(error, StartupError)
        assert "kvstore_absent" in str(error)
        assert "pip install 'kvstore-service[bench]'" in str(error)


def test_an_unknown_benchmark_is_answered_with_the_known_ones() -> None:
    error = CliRunner().invoke(app, ["bench", "nosuch"]).exception
    assert isinstance(error, ConfigurationError)
    known = "codec, faults, link, recompute, reprefill, store, trace"
    assert str(error) == f"there is no benchmark 'nosuch'; benchmarks: {known}"


@pytest.mark.parametrize(
    ("arguments", "missing"),
    [
        ((), "--model, --text, --out"),
        (("--model", "smollm2"), "--text, --out"),
        (("--model", "smollm2", "--text", "a.txt"), "--out"),
        (("--ratio",), "--model"),
    ],
)
def test_calibrate_names_all_missing_options(arguments: tuple[str, ...], missing: str) -> None:
    error = CliRunner().invoke(app, ["calibrate", *arguments]).exception
    assert isinstance(error, ConfigurationError)
    assert str(error) == f"missing options: {missing}; `kvstore calibrate` takes options and no arguments"


def test_calibrate_names_an_unreadable_text_once(tmp_path: Path) -> None:
    text = tmp_path / "absent.txt"
    arguments = ["calibrate", "--model", "smollm2", "--text", str(text), "--out", str(tmp_path / "out")]
    error = CliRunner().invoke(app, arguments).exception
    assert isinstance(error, ConfigurationError)
    assert str(error) == f"cannot read the text {text}: No such file or directory"


def test_the_former_name_of_a_command_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extensions, "entry_points", lambda **_: [])
    result = CliRunner().invoke(app, ["calibrate", "--model", "smollm2", "--ratio"])
    assert isinstance(result.exception, StartupError)
    assert "kvstore tune is not installed" in str(result.exception)


def test_the_former_name_takes_the_options_of_the_command_with_their_defaults() -> None:
    shown = CliRunner().invoke(app, ["calibrate", "--help"], env={"COLUMNS": "200"}).stdout
    for option in inspect.signature(tune).parameters:
        assert "--" + option.removesuffix("_file").replace("_", "-") in shown
    assert "Rounds per measurement. [default: (3)]" in " ".join(shown.split())


def test_a_command_borrows_nothing_where_nothing_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extensions, "entry_points", lambda **_: [])
    bare = typer.Typer()

    @bare.command()
    @add_options(options_of("tune", "Borrowed"))
    def calibrate(model: Annotated[str, typer.Option()], **tune_options: object) -> None:
        print(model, tune_options)

    assert CliRunner().invoke(bare, ["--model", "smollm2"]).stdout == "smollm2 {}\n"
    assert CliRunner().invoke(bare, ["--model", "smollm2", "--tier", "dram"]).exit_code == 2
