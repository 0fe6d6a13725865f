"""`kvstore serve --encryption-key-file`: what a start says about keys, and what `kvstore status` shows."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvstore_client import reloaded_files
from kvstore_cluster.catalogue import ClusterState, FileCatalogue
from kvstore_cluster.disk import SegmentStore
from kvstore_codec.errors import ConfigurationError, EncryptionKeyError, StartupError
from kvstore_service.cli.app import app
from kvstore_service.embedded import EmbeddedCluster
from kvstore_service.encryption import open_keys
from kvstore_service.settings import settings_of
from tests.cluster.disk.chunks import meta_of
from tests.cluster.encryption.stores import NEW, OLD, name_of
from tests.sample_chunk import sample_chunk


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    return written(tmp_path / "keys", NEW)


def written(path: Path, *secrets: bytes) -> Path:
    path.write_text("".join(f"{secret.hex()}\n" for secret in secrets))
    path.chmod(0o600)
    return path


def test_a_catalogue_without_its_key_ends_the_start(tmp_path: Path, key_file: Path) -> None:
    """Before Ray and any node is started."""
    catalogue = FileCatalogue(tmp_path / "data", open_keys(key_file))
    catalogue.save(ClusterState(3))
    catalogue.close()
    for values in ({}, {"encryption_key_file": written(tmp_path / "other", OLD)}):
        cluster = EmbeddedCluster(settings_of(data_dir=tmp_path / "data", **values))
        with pytest.raises(EncryptionKeyError, match=f"catalogue.json is encrypted with key {name_of(NEW)}"):
            cluster.start()


def test_a_wrong_key_file_ends_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="has no encryption keys"):
        EmbeddedCluster(settings_of(encryption_key_file=written(tmp_path / "keys", b"short")))


def test_a_changed_key_file_is_read_again(key_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reloaded_files, "CHECK_PERIOD_S", 0.0)
    keys = open_keys(key_file)
    assert keys().names == [name_of(NEW)]
    written(key_file, OLD, NEW)
    assert keys().names == [name_of(OLD), name_of(NEW)]
    written(key_file, b"short")
    assert keys().names == [name_of(OLD), name_of(NEW)]


@pytest.mark.slow
def test_a_node_without_the_key_of_its_disk_ends_the_start(tmp_path: Path, key_file: Path) -> None:
    data_dir = tmp_path / "data"
    settings = {"data_dir": data_dir, "disk": 64 << 20, "memory": 16 << 20}
    with EmbeddedCluster(settings_of(**settings, encryption_key_file=key_file)) as cluster:
        assert cluster.size == 1
    store = SegmentStore(data_dir / "nodes" / "node-0", 64 << 20, keys=open_keys(key_file))
    store.recover()
    chunk = sample_chunk(1)
    store.append(meta_of(chunk, cost=1.0), [memoryview(chunk.data)], sync=True)
    store.close()
    with EmbeddedCluster(settings_of(**settings, encryption_key_file=key_file)) as cluster:
        shown = CliRunner().invoke(app, ["status", "--address", cluster.address], catch_exceptions=False)
        assert f"node-0, disk, chunks by key: 1 {name_of(NEW)}" in shown.stdout
        shown = CliRunner().invoke(
            app, ["status", "--json", "--address", cluster.address], catch_exceptions=False
        )
        [node] = json.loads(shown.stdout)["nodes"]
        assert node["disk_chunks_by_key"] == {name_of(NEW): 1}
    assert not (data_dir / "catalogue.json").read_bytes().startswith(b"{")
    (data_dir / "catalogue.json").unlink()
    with pytest.raises(StartupError, match=f"segment-.* is encrypted with key {name_of(NEW)}"):
        EmbeddedCluster(settings_of(**settings)).start()
