import inspect
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvstore_api import environment
from kvstore_codec.errors import ConfigurationError
from kvstore_service.cli.app import app
from kvstore_service.cli.serve import serve
from kvstore_service.settings import (
    DEFAULT_ADDRESS,
    Settings,
    effective_settings,
    load_settings,
    settings_of,
    variable,
)


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
        ("memroy: 1GiB", "there is no setting 'memroy'; known settings: nodes, memory"),
        ("nodes: 0", "nodes = 0: "),
        ("memory: lots", "memory = 'lots': not a size; write for example 4GiB (from "),
        ("listen: nowhere", "'nowhere' is not an address"),
        ("metrics_port: 70000", "metrics_port = 70000"),
        ("metrics_port: 0", "metrics_port = 0"),
        ("1: 2", "names a setting 1; names must be text"),
        ("- nodes", "must be a table of settings"),
        ("nodes: [", "cannot read the configuration"),
        ("nodes: 257", "nodes = 257: "),
        ("memory: 0", "memory = 0: "),
        ("repair_bandwidth: 0", "repair_bandwidth = 0: "),
        ("memory: 2048PiB", "memory = '2048PiB': "),
        ("disk: 2048PiB\ndata_dir: /x", "disk = '2048PiB': "),
        ("nodes: 0x" + "F" * 5000, "integer of more than 63 bits"),
        ("metrics_port: 1" + ":59" * 5000, "integer of more than 63 bits"),
        ("listen: [{port: 0x" + "F" * 5000 + "}]", "integer of more than 63 bits"),
        ("? 0x" + "F" * 5000 + "\n: 1", "integer of more than 63 bits"),
        ('listen: "a b:1"', "'a b:1' is not an address"),
        ('listen: "a\\eb:1"', "is not an address"),
        ("listen: a:" + "9" * 4000, "listen = 'a:999"),
        ("listen: a:\u0661", "is not an address"),
        ('data_dir: "\\ud800"', "data_dir = '\\ud800': "),
        ('ray_address: "\\ud800"', "ray_address = '\\ud800': "),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(ConfigurationError) as refusal:
        load_settings(write(tmp_path / "c.yaml", text))
    assert complaint in str(refusal.value)
    assert len(str(refusal.value)) < 600


def test_a_large_number_in_toml_is_named(tmp_path: Path) -> None:
    config = write(tmp_path / "c.toml", "metrics_port = 0x" + "F" * 5000)
    with pytest.raises(ConfigurationError, match="integer of more than 63 bits"):
        effective_settings(config)


def test_only_a_regular_file_is_read(tmp_path: Path) -> None:
    """A pipe that nobody writes into would be waited for, and SIGTERM with it."""
    os.mkfifo(tmp_path / "c.yaml")
    (tmp_path / "d.yaml").mkdir()
    write(tmp_path / "e", "nodes: 2")
    (tmp_path / "e.yaml").symlink_to("e")
    for name, complaint in (("c.yaml", "it is not a regular file"), ("d.yaml", "Is a directory")):
        with pytest.raises(ConfigurationError, match=complaint):
            load_settings(tmp_path / name)
    assert load_settings(tmp_path / "e.yaml").nodes == 2


def test_a_path_need_not_be_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environb, b"KVSTORE_DATA_DIR", b"/tmp/\xff")
    assert load_settings().data_dir == Path(os.fsdecode(b"/tmp/\xff"))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="No such file"):
        load_settings(tmp_path / "missing.yaml")
    with pytest.raises(ConfigurationError, match=r"neither a .yaml nor a .toml file"):
        load_settings(write(tmp_path / "c.ini", ""))
    with pytest.raises(ConfigurationError, match="cannot read the configuration"):
        load_settings(write(tmp_path / "c.toml", "nodes = "))


FIELDS = sorted(Settings.model_fields)
NUMBERS = [name for name in FIELDS if "int" in str(Settings.model_fields[name].annotation).lower()]
SWITCHES = [name for name in FIELDS if Settings.model_fields[name].annotation is bool]
PATHS = [name for name in FIELDS if "Path" in str(Settings.model_fields[name].annotation)]


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in FIELDS:
        monkeypatch.delenv(variable(name), raising=False)


# A value other than the default, and what else has to be set with it.
VALUES = {
    "nodes": "2",
    "memory": "2GiB",
    "listen": "127.0.0.1:1",
    "data_dir": "/x",
    "disk": "1GiB",
    "durability": "memory",
    "policy": "lru",
    "replicas": "2",
    "redis": "redis://x",
    "ray_address": "x:1",
    "repair_bandwidth": "1GiB",
    "tls_cert": "/c",
    "tls_key": "/k",
    "tls_ca": "/a",
    "tls_client_ca": "/b",
    "tls_name": "kvstore.example",
    "credentials": "/c.json",
    "insecure": "true",
    "encryption_key_file": "/keys",
    "metrics_port": "9100",
    "events": "127.0.0.1:5557",
    "otlp_endpoint": "grpc://127.0.0.1:4317",
    "metrics_tenants": "5",
    "log_format": "json",
    "log_level": "debug",
    "experiments": "true",
    "ray_join": "true",
    "keep_nodes": "true",
    "storage_port": "7421",
    "node_token_file": "/token",
}
_TLS = ["tls_cert", "tls_key"]
TOGETHER = {
    "disk": ["data_dir"],
    "tls_cert": ["tls_key"],
    "tls_key": ["tls_cert"],
    "tls_ca": _TLS,
    "tls_client_ca": _TLS,
    "tls_name": _TLS,
    "ray_join": ["ray_address"],
    "keep_nodes": ["ray_address"],
    "storage_port": ["ray_address"],
    "node_token_file": ["credentials"],
}


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("empty", ["", "  "])
def test_what_is_empty_is_not_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, empty: str
) -> None:
    """An empty flag leaves it to the variable, that one to the file, and that one to the default."""
    monkeypatch.setenv(variable(name), empty)
    for text in ("", f'{name}: "{empty}"', f"{name}:", f"{name}: ~"):
        assert load_settings(write(tmp_path / "c.yaml", text), **{name: empty}) == Settings()
    lines = [f"{each}: {VALUES[each]}\n" for each in (name, *TOGETHER.get(name, []))]
    config = write(tmp_path / "c.yaml", "".join(lines))
    assert getattr(load_settings(config, **{name: empty}), name) != getattr(Settings(), name)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("place", ["flag", "variable", "file"])
def test_the_home_folder_is_found_in_every_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, place: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    together = {each: VALUES[each] for each in TOGETHER.get(name, [])}
    flags = together | ({name: "~/below"} if place == "flag" else {})
    if place != "flag":
        flags.pop(name, None)
    if place == "variable":
        monkeypatch.setenv(variable(name), "~/below")
    config = write(tmp_path / "c.yaml", f"{name}: ~/below\n" if place == "file" else "")
    assert getattr(load_settings(config, **flags), name) == tmp_path / "below"


def test_a_home_folder_that_is_none_is_named() -> None:
    with pytest.raises(
        ConfigurationError, match=r"data_dir = '~nobody-of-that-name/x'.*no home folder.*--data-dir"
    ):
        load_settings(data_dir="~nobody-of-that-name/x")


@pytest.mark.parametrize("name", [name for name in FIELDS if name not in SWITCHES])
@pytest.mark.parametrize("kind", ["yaml", "toml"])
def test_true_is_neither_a_number_nor_text(tmp_path: Path, name: str, kind: str) -> None:
    text = f"{name}: true" if kind == "yaml" else f"{name} = true"
    config = write(tmp_path / f"c.{kind}", text)
    with pytest.raises(ConfigurationError, match=f"{name} = .*not true or false.*{config}"):
        load_settings(config)


@pytest.mark.parametrize("name", SWITCHES)
@pytest.mark.parametrize(("text", "value"), [("true", True), ("'1'", True), ("no", False), ("'off'", False)])
def test_a_switch_is_on_or_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str, value: bool
) -> None:
    for other in TOGETHER.get(name, []):
        monkeypatch.setenv(variable(other), VALUES[other])
    assert getattr(load_settings(write(tmp_path / "c.yaml", f"{name}: {text}")), name) is value
    monkeypatch.setenv(variable(name), text.strip("'"))
    assert getattr(load_settings(), name) is value
    assert getattr(load_settings(**{name: not value}), name) is not value
    with pytest.raises(ConfigurationError, match=f"{name} = 'perhaps': "):
        load_settings(**{name: "perhaps"})


def test_every_setting_is_an_option_of_serve() -> None:
    options = inspect.signature(serve).parameters
    assert set(options) == {"config", *FIELDS}
    shown = CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "200"}).stdout
    for name in FIELDS:
        assert "--" + name.replace("_", "-") in shown
    for default in ("(1GiB)", "(127.0.0.1:7420)", "(a temporary one)", "(none)", "(100MiB)", "(relaxed)"):
        assert default in shown


def test_a_cluster_of_a_programs_own_heeds_no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVSTORE_NODES", "3")
    settings = settings_of(memory="2GiB")
    assert (settings.nodes, settings.memory, settings.listen) == (1, 2 << 30, "127.0.0.1:0")
    with pytest.raises(ConfigurationError, match="no setting 'memroy'"):
        settings_of(memroy="2GiB")


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("link", ["tcp://10.0.0.1:9090", "udp://svc:1"])
def test_what_kubernetes_sets_for_a_service_is_no_setting(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str, link: str
) -> None:
    monkeypatch.setattr(environment, "_named", set())
    monkeypatch.setenv(variable(name), link)
    assert load_settings() == load_settings() == Settings()
    (line,) = caplog.messages
    assert variable(name) in line
    assert "enableServiceLinks: false" in line


@pytest.mark.parametrize("name", NUMBERS)
def test_a_wrong_variable_is_named(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(variable(name), "http://10.0.0.1")
    with pytest.raises(ConfigurationError, match=f"{name} = .*(integer|byte).*{variable(name)}"):
        load_settings()


NESTED = 10_000


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("c.yaml", "nodes: " + "[" * NESTED, "nested too deeply"),
        ("c.yaml", "{a: " * NESTED, "nested too deeply"),
        ("c.yaml", "- " * NESTED, "nested too deeply"),
        ("c.toml", "nodes = " + "[" * NESTED, "nested too deeply"),
        ("c.toml", "nodes = " + "{a=" * NESTED, "nested too deeply"),
        ("c.yaml", "a: &a [x, x]\nnodes: *a", "alias"),
        ("c.yaml", "nodes: " + "9" * 6000, "cannot read"),
        ("c.yaml", "nodes: 2001-99-99", "cannot read"),
        ("c.yaml", "nodes: !!python/object:os.system x", "cannot read"),
        ("c.yaml", "\n".join(f"x{number}: 1" for number in range(5000)), "and 4992 more"),
        ("c.yaml", "policy: " + "x" * 60_000, "has 60000 characters"),
        ("c.yaml", "x" * 1000 + ": 1", "there is no setting"),
        ("c.yaml", "? [" + "x, " * 2000 + "]\n: 1", ""),
        ("c.yaml", "- " + "x" * 60_000, "must be a table of settings"),
        ("c.yaml", "#" * (1 << 20), "has more than"),
        ("c.yaml", 'data_dir: "a\\0b"', "NUL"),
        ("c.yaml", "\x00", "cannot read"),
    ],
    ids=lambda value: value[:12] if isinstance(value, str) else None,
)
def test_whatever_a_file_holds_is_refused_in_a_short_sentence(
    tmp_path: Path, name: str, text: str, reason: str
) -> None:
    config = write(tmp_path / name, text)
    with pytest.raises(ConfigurationError) as refusal:
        load_settings(config)
    assert reason in str(refusal.value)
    assert len(str(refusal.value)) < 4000
    assert "\n" not in str(refusal.value)
    assert str(config) in str(refusal.value) or "known settings" in str(refusal.value)


def test_an_exponential_document_is_refused_at_once(tmp_path: Path) -> None:
    bomb = "a0: &a0 [x, x]\n" + "".join(
        f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]\n" for level in range(1, 10)
    )
    with pytest.raises(ConfigurationError, match=r"line 2 uses the alias \*a0") as refusal:
        load_settings(write(tmp_path / "c.yaml", bomb))
    assert len(str(refusal.value)) < 300


def test_no_error_shows_a_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ("redis: [hunter2]", "redis: {hunter2: 1}", "disk: 1GiB\nredis: redis://:hunter2@x"):
        with pytest.raises(ConfigurationError) as refusal:
            load_settings(write(tmp_path / "c.yaml", text))
        assert "hunter2" not in str(refusal.value)
    monkeypatch.setenv("KVSTORE_REDIS", "redis://:hunter2@x")
    assert "hunter2" not in repr(effective_settings())


def test_each_setting_says_where_it_is_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write(tmp_path / "c.yaml", "memory: 2GiB\nnodes: 2\npolicy: lru\n")
    monkeypatch.setenv("KVSTORE_NODES", "3")
    monkeypatch.setenv("KVSTORE_POLICY", "")
    found = {
        setting.name: (setting.value, setting.source)
        for setting in effective_settings(config, listen="127.0.0.1:5")
    }
    assert found["memory"] == ("2.0GiB", str(config))
    assert found["nodes"] == ("3", "KVSTORE_NODES")
    assert found["policy"] == ("lru", str(config))
    assert found["listen"] == ("127.0.0.1:5", "--listen")
    assert found["redis"] == ("not set", "default")
    assert set(found) == set(Settings.model_fields)


def test_a_nodes_durability_is_not_a_clients(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Both may stand in one environment."""
    monkeypatch.setattr(environment, "_named", set())
    monkeypatch.setenv("KVSTORE_PUT_DURABILITY", "default")
    assert load_settings().durability == "relaxed"
    monkeypatch.setenv("KVSTORE_DURABILITY", "default")  # by its former name
    assert load_settings().durability == "relaxed"
    assert not caplog.records
    monkeypatch.setenv("KVSTORE_DURABILITY", "memory")
    assert load_settings().durability == "memory"
    assert "KVSTORE_DURABILITY is read as KVSTORE_NODE_DURABILITY" in caplog.text
    monkeypatch.setenv("KVSTORE_NODE_DURABILITY", "durable")
    assert load_settings().durability == "durable"
    settings = {setting.name: setting.source for setting in effective_settings()}
    assert settings["durability"] == "KVSTORE_NODE_DURABILITY"
