"""What a service needs before it listens where other machines can reach it."""

from pathlib import Path

import pytest

from kvstore_codec.errors import ConfigurationError
from kvstore_service.embedded import EmbeddedCluster
from kvstore_service.identity.file import changing
from kvstore_service.listen import Address
from kvstore_service.settings import Settings, settings_of
from tests.authority import Authority


def _settings(**values: object) -> Settings:
    return settings_of(memory="16MiB", **values)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "localhost"])
def test_this_machines_loopback_needs_nothing(host: str) -> None:
    assert Address(host, 0).is_loopback
    EmbeddedCluster(_settings(listen=str(Address(host, 0))))


@pytest.mark.parametrize("exposed", [{"listen": "0.0.0.0:0"}, {"listen": "[::]:0"}, {"ray_address": "auto"}])
def test_an_address_that_others_reach_needs_credentials_and_tls(
    tmp_path: Path, exposed: dict[str, str]
) -> None:
    file = tmp_path / "credentials.json"
    with changing(file):
        pass
    pair = Authority(tmp_path / "files").sign("server")
    credentials, tls = {"credentials": file}, {"tls_cert": pair.certificate, "tls_key": pair.key}
    for given, missing in (
        ({}, "--credentials FILE .* and --tls-cert FILE"),
        (credentials, "give --tls-cert FILE and --tls-key FILE, or --insecure"),
        (tls, r"give --credentials FILE \(`kvstore credentials add` makes it\), or --insecure"),
    ):
        with pytest.raises(ConfigurationError, match=missing):
            EmbeddedCluster(_settings(**exposed, **given))
        EmbeddedCluster(_settings(**exposed, **given, insecure=True))
    EmbeddedCluster(_settings(**exposed, **credentials, **tls))


@pytest.mark.parametrize("host", ["10.0.0.5", "0.0.0.0", "::"])  # noqa: S104
def test_everything_else_may_be_reached_by_others(host: str) -> None:
    assert not Address(host, 0).is_loopback


def test_files_that_cannot_be_used_end_the_start(tmp_path: Path) -> None:
    for wrong in ({"credentials": tmp_path / "x"}, {"tls_cert": tmp_path / "x", "tls_key": tmp_path / "y"}):
        with pytest.raises(ConfigurationError, match=str(tmp_path / "x")):
            EmbeddedCluster(_settings(**wrong))
