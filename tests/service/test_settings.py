from pathlib import Path

import pytest

from kvstore_codec.errors import ConfigurationError
from kvstore_service.settings import DEFAULT_ADDRESS, Settings, load_settings


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_defaults() -> None:
    settings = load_settings()
    assert (settings.nodes, settings.memory, settings.listen) == (1, 1 << 30, DEFAULT_ADDRESS)
    assert (settings.data_dir, settings.metrics_port) == (None, None)


def test_flags_win_over_the_environment_over_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write(tmp_path / "c.yaml", "nodes: 2\nmemory: 2GiB\nlisten: 127.0.0.1:1\n")
    monkeypatch.setenv("KVSTORE_MEMORY", "3GiB")
    monkeypatch.setenv("KVSTORE_LISTEN", "127.0.0.1:2")
    settings = load_settings(config, listen="127.0.0.1:3", nodes=None)
    assert (settings.nodes, settings.memory, settings.listen) == (2, 3 << 30, "127.0.0.1:3")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("c.yaml", "memory: 4GiB\ndata_dir: /data\nmetrics_port: 9100\n"),
        ("c.yml", "memory: 4294967296\ndata_dir: /data\nmetrics_port: '9100'\n"),
        ("c.toml", 'memory = "4 GiB"\ndata_dir = "/data"\nmetrics_port = 9100\n'),
    ],
)
def test_files_of_both_kinds(tmp_path: Path, name: str, text: str) -> None:
    settings = load_settings(write(tmp_path / name, text))
    assert (settings.memory, settings.data_dir, settings.metrics_port) == (4 << 30, Path("/data"), 9100)


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    assert load_settings(write(tmp_path / "c.yaml", "")).nodes == Settings().nodes


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("memroy: 1GiB", "there is no setting 'memroy', known are nodes, memory"),
        ("nodes: 0", "nodes = 0: "),
        ("memory: lots", "memory = 'lots': "),
        ("listen: nowhere", "'nowhere' is not an address"),
        ("metrics_port: 70000", "metrics_port = 70000"),
        ("metrics_port: 0", "metrics_port = 0"),
        ("1: 2", "names a setting 1, which is not text"),
        ("- nodes", "must be a table of settings"),
        ("nodes: [", "cannot read the configuration"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(ConfigurationError) as refusal:
        load_settings(write(tmp_path / "c.yaml", text))
    assert complaint in str(refusal.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="No such file"):
        load_settings(tmp_path / "missing.yaml")
    with pytest.raises(ConfigurationError, match=r"neither .yaml nor .toml"):
        load_settings(write(tmp_path / "c.ini", ""))
    with pytest.raises(ConfigurationError, match="cannot read the configuration"):
        load_settings(write(tmp_path / "c.toml", "nodes = "))
