"""Small encrypted files: the list of forgotten tenants, the catalogue, and canaries."""

import logging
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore_cluster.canaries import CanaryRegistry, Origin
from kvstore_cluster.catalogue import ClusterState, FileCatalogue, file
from kvstore_cluster.disk.forgotten import ForgottenRecords, read_forgotten, write_forgotten
from kvstore_cluster.encryption import FileCipher, KeySource
from kvstore_cluster.forgotten import Forgotten
from kvstore_codec.canary.probe import Probe
from kvstore_codec.canary.sketch import SketchHeader, write_sketch
from kvstore_codec.errors import CatalogueError, ChecksumError, EncryptionKeyError
from kvstore_codec.model_spec import KVDtype
from tests.cluster.encryption.stores import NEW, OLD, keys_of, name_of

TENANT = "a-tenant-whose-name-is-secret"
STATE = ClusterState(7, quotas={TENANT: 5}, forgotten=Forgotten({TENANT: 3}))
MODEL = b"m" * 32
PATIENCE_S = 20.0


def source(*secrets: bytes) -> KeySource:
    keys = keys_of(*secrets)
    return lambda: keys


def sketch() -> bytes:
    header = SketchHeader(MODEL, Probe(100, 512), KVDtype.FLOAT32, (2, 1, 4, 8))
    return write_sketch(header, bytes(header.body_bytes))


@pytest.fixture
def catalogues(tmp_path: Path) -> Iterator[list[FileCatalogue]]:
    opened: list[FileCatalogue] = []
    yield opened
    for catalogue in opened:
        catalogue.close()


def reopened(catalogues: list[FileCatalogue], folder: Path, keys: KeySource | None) -> FileCatalogue:
    if catalogues:
        catalogues.pop().close()
    catalogues.append(FileCatalogue(folder, keys))
    return catalogues[-1]


# ---- the format


@pytest.mark.parametrize("content", [b"", b"x", b"content" * 1000])
def test_contents_come_back(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file"
    written = FileCipher(source(OLD)).encrypt(path, content)
    assert content not in written or not content.strip(b"x")
    assert FileCipher(source(NEW, OLD)).decrypt(path, written) == content
    assert FileCipher(source(OLD)).encrypt(path, content) != written, "each version has a key of its own"


def test_every_changed_byte_is_found(tmp_path: Path) -> None:
    path, cipher = tmp_path / "file", FileCipher(source(NEW))
    written = cipher.encrypt(path, b"some content")
    for at in range(8, len(written)):
        changed = written[:at] + bytes([written[at] ^ 4]) + written[at + 1 :]
        with pytest.raises((ChecksumError, EncryptionKeyError) if 12 <= at < 20 else Exception):
            cipher.decrypt(path, changed)
    for length in range(8, len(written)):
        with pytest.raises(ChecksumError):
            cipher.decrypt(path, written[:length])


def test_a_file_is_bound_to_its_name(tmp_path: Path) -> None:
    cipher = FileCipher(source(NEW))
    with pytest.raises(ChecksumError):
        cipher.decrypt(tmp_path / "other", cipher.encrypt(tmp_path / "file", b"content"))


def test_without_keys_contents_stay_as_they_are(tmp_path: Path) -> None:
    cipher = FileCipher()
    assert cipher.encrypt(tmp_path / "file", b"content") == b"content"
    assert cipher.decrypt(tmp_path / "file", b"content") == b"content"


# ---- forgotten tenants


def test_forgotten_tenants_are_encrypted(tmp_path: Path) -> None:
    records = ForgottenRecords().with_applied(Forgotten({TENANT: 7}), [TENANT], 1000)
    write_forgotten(tmp_path, records, FileCipher(source(NEW)))
    path = tmp_path / "forgotten.json"
    assert TENANT.encode() not in path.read_bytes()
    assert read_forgotten(tmp_path, FileCipher(source(NEW))) == (records, name_of(NEW))
    for keys in (None, source(OLD)):
        with pytest.raises(EncryptionKeyError, match=name_of(NEW)):
            read_forgotten(tmp_path, FileCipher(keys))


def test_a_changed_list_of_forgotten_tenants_counts_for_nothing(tmp_path: Path) -> None:
    records = ForgottenRecords().with_applied(Forgotten({TENANT: 7}), [TENANT], 1000)
    write_forgotten(tmp_path, records, FileCipher(source(NEW)))
    path = tmp_path / "forgotten.json"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert read_forgotten(tmp_path, FileCipher(source(NEW))) == (ForgottenRecords(), None)


# ---- the catalogue


def test_the_catalogue_is_encrypted(tmp_path: Path, catalogues: list[FileCatalogue]) -> None:
    reopened(catalogues, tmp_path, source(NEW)).save(STATE)
    path = tmp_path / "catalogue.json"
    assert TENANT.encode() not in path.read_bytes()
    assert reopened(catalogues, tmp_path, source(NEW)).load() == STATE
    before = path.read_bytes()
    for keys in (None, source(OLD)):
        with pytest.raises(EncryptionKeyError, match=f"{name_of(NEW)}.*move {path} away"):
            reopened(catalogues, tmp_path, keys).load()
    assert path.read_bytes() == before


def test_a_changed_catalogue_is_damaged(tmp_path: Path, catalogues: list[FileCatalogue]) -> None:
    reopened(catalogues, tmp_path, source(NEW)).save(STATE)
    path = tmp_path / "catalogue.json"
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)
    with pytest.raises(CatalogueError, match="authentication"):
        reopened(catalogues, tmp_path, source(NEW)).load()


@pytest.mark.parametrize("before", [None, OLD], ids=["plain", "old key"])
def test_a_catalogue_of_another_key_is_written_again(
    tmp_path: Path,
    catalogues: list[FileCatalogue],
    before: bytes | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(file, "_WATCH_PERIOD_S", 0.05)
    caplog.set_level(logging.INFO)
    reopened(catalogues, tmp_path, None if before is None else source(before)).save(STATE)
    assert reopened(catalogues, tmp_path, source(NEW, OLD)).load() == STATE
    deadline_s = time.monotonic() + PATIENCE_S
    while bytes.fromhex(name_of(NEW)) not in (tmp_path / "catalogue.json").read_bytes()[:20]:
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    assert reopened(catalogues, tmp_path, source(NEW)).load() == STATE
    assert f"catalogue.json is encrypted with key {name_of(NEW)}" in caplog.text


# ---- canaries


def test_canaries_are_encrypted_and_follow_the_key(tmp_path: Path) -> None:
    secrets = [OLD]
    registry = CanaryRegistry(tmp_path, keys=lambda: keys_of(*secrets))
    made = registry.put(MODEL, 0, Origin("model"), sketch(), tenant=TENANT)
    [path] = tmp_path.iterdir()
    assert TENANT.encode() not in path.read_bytes()
    secrets.insert(0, NEW)
    registry.update_key(threading.Event())
    assert registry.get(MODEL, TENANT) == made
    assert CanaryRegistry(tmp_path, keys=source(NEW)).get(MODEL, TENANT) == made
    for keys in (None, source(OLD)):
        with pytest.raises(EncryptionKeyError, match=name_of(NEW)):
            CanaryRegistry(tmp_path, keys=keys)


def test_plain_canaries_are_encrypted_after_the_start(tmp_path: Path) -> None:
    made = CanaryRegistry(tmp_path).put(MODEL, 0, Origin("model"), sketch(), tenant=TENANT)
    [path] = tmp_path.iterdir()
    plain = path.read_bytes()
    registry = CanaryRegistry(tmp_path, keys=source(NEW))
    assert path.read_bytes() == plain, "a start on a full disk writes nothing"
    registry.update_key(threading.Event())
    assert TENANT.encode() not in path.read_bytes()
    assert registry.get(MODEL, TENANT) == made


def test_canaries_are_encrypted_again_once_the_disk_has_room(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    CanaryRegistry(tmp_path, keys=source(OLD)).put(MODEL, 0, Origin("model"), sketch())
    [path] = tmp_path.iterdir()
    registry = CanaryRegistry(tmp_path, keys=source(NEW, OLD))
    aside = tmp_path / f".unfinished-{path.name}"
    aside.symlink_to("/dev/full")
    with pytest.raises(CatalogueError, match="No space left"):
        registry.update_key(threading.Event())
    aside.unlink()
    caplog.set_level(logging.INFO)
    done = f"canaries in {tmp_path} are encrypted with key {name_of(NEW)}"
    assert done not in caplog.text
    registry.update_key(threading.Event())
    assert done in caplog.text
    assert CanaryRegistry(tmp_path, keys=source(NEW)).get(MODEL)[1] == sketch()


def test_encrypting_canaries_again_keeps_the_order_of_their_use(tmp_path: Path) -> None:
    registry = CanaryRegistry(tmp_path)
    for tenant, used_s in (("a", 3), ("b", 1), ("c", 2)):
        registry.put(MODEL, 0, Origin("model"), sketch(), tenant=tenant)
        [path] = (path for path in tmp_path.iterdir() if path.stat().st_mtime > 10)
        os.utime(path, (used_s, used_s))
    CanaryRegistry(tmp_path, keys=source(NEW)).update_key(threading.Event())
    again = CanaryRegistry(tmp_path, keys=source(NEW))
    assert [record.tenant for record in again.records()] == ["b", "c", "a"]


def test_a_coordinator_that_stops_does_not_wait_for_all_canaries(tmp_path: Path) -> None:
    CanaryRegistry(tmp_path, keys=source(OLD)).put(MODEL, 0, Origin("model"), sketch())
    registry, stopping = CanaryRegistry(tmp_path, keys=source(NEW, OLD)), threading.Event()
    stopping.set()
    registry.update_key(stopping)
    assert CanaryRegistry(tmp_path, keys=source(OLD)).get(MODEL)[1] == sketch()


def test_a_changed_canary_is_computed_again(tmp_path: Path) -> None:
    CanaryRegistry(tmp_path, keys=source(NEW)).put(MODEL, 0, Origin("model"), sketch())
    [path] = tmp_path.iterdir()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert CanaryRegistry(tmp_path, keys=source(NEW)).get(MODEL)[1] == b""
