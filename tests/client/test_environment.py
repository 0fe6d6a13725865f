"""A client starts in whatever environment its process was given: empty variables, no home, no writable folder."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvstore_api import environment
from kvstore_client import connect
from kvstore_client.cache_dir import default_cache_dir
from kvstore_client.settings import ClientSettings, Durability, settings_by_name
from kvstore_codec.errors import ConfigurationError
from tests.client.conftest import ServedCluster
from tests.client.models import random_prompt, tiny_model

_LINK = "tcp://10.0.0.1:7420"


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("KVSTORE_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def no_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A user id that the password database does not know, without HOME. Returns the folder for temporary files."""

    def unknown(uid: int) -> object:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("name", settings_by_name())
def test_an_empty_variable_means_not_set(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    expected = ClientSettings()
    monkeypatch.setenv(f"KVSTORE_{name.upper()}", "")
    assert ClientSettings() == expected
    connect().close()


@pytest.mark.parametrize("name", ["floor", "recompute_ratio", "disk_tier", "tls_ca"])
def test_an_empty_argument_means_not_set_where_a_setting_may_be_unset(name: str) -> None:
    assert settings_by_name()[name].of(ClientSettings(**{name: ""})) is None


def test_tilde_is_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/worker")
    assert ClientSettings(cache_dir=Path("~/kv")).cache_dir == Path("/home/worker/kv")
    assert ClientSettings(tls_ca="~/ca.pem").security.tls_ca == Path("/home/worker/ca.pem")  # type: ignore[arg-type]
    monkeypatch.setenv("KVSTORE_TLS_CA", "~/other.pem")
    assert ClientSettings().security.tls_ca == Path("/home/worker/other.pem")
    monkeypatch.setenv("XDG_CACHE_HOME", "~/cache")
    assert ClientSettings().cache_dir == default_cache_dir() == Path("/home/worker/cache/kvstore")
    monkeypatch.setenv("KVSTORE_CACHE_DIR", "~/kv")
    assert ClientSettings().cache_dir == default_cache_dir() == Path("/home/worker/kv")


def test_tilde_without_a_home_is_an_error_with_a_sentence(no_home: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"cache_dir: .*~/kv.* no home folder"):
        connect(cache_dir="~/kv")


def test_kubernetes_links_do_not_reach_the_settings(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What Kubernetes sets in every pod beside Services called `kvstore` and `kvstore-ttl-s`."""
    for name, value in {
        "KVSTORE_PORT": _LINK,
        "KVSTORE_SERVICE_HOST": "10.0.0.1",
        "KVSTORE_SERVICE_PORT": "7420",
        "KVSTORE_PORT_7420_TCP": _LINK,
        "KVSTORE_PORT_7420_TCP_PROTO": "tcp",
        "KVSTORE_TTL_S": "udp://[fd00::1]:53",
    }.items():
        monkeypatch.setenv(name, value)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert ClientSettings() == ClientSettings(ttl_s=0)
    (line,) = [record.getMessage() for record in caplog.records]
    assert "KVSTORE_TTL_S" in line


def test_an_address_may_be_a_link(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVSTORE_ADDRESS", _LINK)
    assert ClientSettings().address == "10.0.0.1:7420"
    assert ClientSettings(address="tcp://cache:1").address == "cache:1"


def test_a_wrong_value_is_still_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigurationError, match="not of the form host:port"):
        connect("http://10.0.0.1:7420/")
    monkeypatch.setenv("KVSTORE_TTL_S", "soon")
    with pytest.raises(ConfigurationError, match="ttl_s"):
        connect()


def test_without_a_home_the_cache_is_private_to_the_user(no_home: Path) -> None:
    folder = default_cache_dir()
    assert folder.parent == no_home
    assert folder.stat().st_uid == os.getuid()
    assert folder.stat().st_mode & 0o777 == 0o700
    assert default_cache_dir() == folder
    connect().close()


@pytest.mark.parametrize("planted", ["link", "file", "open"])
def test_a_folder_that_another_user_may_have_planted_is_not_used(no_home: Path, planted: str) -> None:
    folder = no_home / f"kvstore-{os.getuid()}"
    if planted == "link":
        (no_home / "elsewhere").mkdir()
        folder.symlink_to(no_home / "elsewhere")
    elif planted == "file":
        folder.touch()
    else:
        folder.mkdir()
        folder.chmod(0o777)
    found = default_cache_dir()
    assert found != folder
    assert not found.exists()
    with pytest.raises(OSError, match="Not a directory"):
        found.mkdir(parents=True)


def test_a_cache_that_cannot_be_written_stops_nothing(
    cluster: ServedCluster, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A file in its place fails like a read-only file system, also for the superuser."""
    from kvstore_client.engines.transformers import CachedModel

    (tmp_path / "file").touch()
    model, prompt = tiny_model("llama"), random_prompt(600, seed=1)
    with (
        caplog.at_level(logging.WARNING),
        connect(cluster.address, cache_dir=tmp_path / "file" / "cache", fetch_policy="adaptive") as client,
    ):
        cached = CachedModel(model, client)
        cached.generate(prompt, max_new_tokens=1, do_sample=False)
        client.store.flush()
        cached.generate(prompt, max_new_tokens=1, do_sample=False)
        assert cached.last_report.fetch is not None
    lines = [r.getMessage() for r in caplog.records if "KVSTORE_CACHE_DIR" in r.getMessage()]
    assert len(lines) == 1


@pytest.mark.slow
@pytest.mark.skipif(os.getuid() != 0, reason="only the superuser can become a user that does not exist")
def test_a_user_id_that_nobody_knows_can_connect(cluster: ServedCluster) -> None:
    script = (
        "import os\n"
        "from kvstore_client import connect\n"
        "os.setgid(54321); os.setuid(54321)\n"  # who may not be able to read the interpreter's own files
        f"client = connect({cluster.address!r})\n"
        "print(client.settings.cache_dir)\n"
        "client.close()\n"
    )
    variables = {n: v for n, v in os.environ.items() if n not in ("HOME", "XDG_CACHE_HOME")}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=variables,
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("kvstore-54321")


def test_durability_has_a_name_of_its_own_and_its_former_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(environment, "_named", set())
    monkeypatch.setenv("KVSTORE_DURABILITY", "durable")
    for _ in range(2):
        assert ClientSettings().store.durability is Durability.DURABLE
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "KVSTORE_DURABILITY is read as KVSTORE_PUT_DURABILITY" in warning
    monkeypatch.setenv("KVSTORE_PUT_DURABILITY", "memory")
    assert ClientSettings().store.durability is Durability.MEMORY
    with connect(durability="relaxed") as client:
        assert client.settings.store.durability is Durability.RELAXED
    assert "put_durability" in caplog.text
