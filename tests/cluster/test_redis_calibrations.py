"""Calibrations with copies in a real Redis: they outlive the coordinator's disk, and Redis' memory."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from blake3 import blake3

from kvstore_api.calibrations import MAX_PIECE_BYTES
from kvstore_cluster.calibrations import CalibrationRecord, CalibrationRegistry, RedisMirror
from kvstore_codec.errors import CatalogueError, DamagedCalibrationError
from tests.redis_server import RedisServer

MODEL, OTHER_MODEL = b"m" * 32, b"n" * 32
LARGE = os.urandom(2 * MAX_PIECE_BYTES + 5)


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


@pytest.fixture
def mirror(server: RedisServer) -> Iterator[RedisMirror]:
    with server.client() as client:
        client.flushall()
    mirror = RedisMirror(server.url)
    yield mirror
    mirror.close()


def stored(registry: CalibrationRegistry, data: bytes, model_digest: bytes = MODEL) -> CalibrationRecord:
    record = CalibrationRecord(blake3(data).digest(), model_digest, len(data))
    registry.put(record, [data[:1000], data[1000:]])
    return record


def read(registry: CalibrationRegistry, record: CalibrationRecord) -> bytes:
    return b"".join(registry.pieces(record.digest))


def test_calibrations_outlive_the_disk(mirror: RedisMirror, tmp_path: Path) -> None:
    registry = CalibrationRegistry(tmp_path / "first", mirror)
    large, small = stored(registry, LARGE), stored(registry, b"small")
    stored(registry, b"other", OTHER_MODEL)
    stored(registry, LARGE)  # the newest now
    successor = CalibrationRegistry(tmp_path / "second", mirror)
    assert successor.records() == registry.records()
    assert successor.find(MODEL) == large
    assert (read(successor, large), read(successor, small)) == (LARGE, b"small")


def test_they_are_kept_in_pieces_under_the_namespace(
    mirror: RedisMirror, server: RedisServer, tmp_path: Path
) -> None:
    large = stored(CalibrationRegistry(tmp_path, mirror), LARGE)
    prefix = "kvstore:calibrations:"
    with server.client() as client:
        pieces = [f"{prefix}data:{large.digest.hex()}:{number}" for number in range(3)]
        assert {key.decode() for key in client.scan_iter()} == {
            *pieces,
            f"{prefix}index",
            f"{prefix}sequence",
        }
        assert [client.strlen(piece) for piece in pieces] == [MAX_PIECE_BYTES, MAX_PIECE_BYTES, 5]
        assert {client.ttl(piece) for piece in pieces} == {-1}


def test_a_wiped_redis_gets_its_copies_again(
    mirror: RedisMirror, server: RedisServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    registry = CalibrationRegistry(tmp_path / "first", mirror)
    records = [stored(registry, LARGE), stored(registry, b"small")]
    with server.client() as client:
        client.flushall()
    CalibrationRegistry(tmp_path / "first", mirror)
    assert "was not in the mirror" in caplog.text
    assert mirror.records() == records
    assert list(CalibrationRegistry(tmp_path / "second", mirror).records()) == records


def test_without_redis_they_can_be_read_but_not_stored(server: RedisServer, tmp_path: Path) -> None:
    with RedisServer() as another:
        mirror = RedisMirror(another.url)
        registry = CalibrationRegistry(tmp_path, mirror)
        large = stored(registry, LARGE)
        another.kill()
        with pytest.raises(CatalogueError, match="cannot be used"):
            stored(registry, b"small")
        assert registry.records() == (large,)
        assert read(registry, large) == LARGE
        assert len(list(tmp_path.iterdir())) == 1
        another.start()
        stored(registry, b"small")
        mirror.close()


def test_what_breaks_off_or_is_not_what_it_says_leaves_nothing(
    mirror: RedisMirror, server: RedisServer, tmp_path: Path
) -> None:
    registry = CalibrationRegistry(tmp_path, mirror)
    with pytest.raises(DamagedCalibrationError):
        registry.put(CalibrationRecord(b"d" * 32, MODEL, 5), [b"12345"])
    with server.client() as client:
        assert client.keys() == []


def test_damage_in_redis_is_noticed_and_the_rest_is_restored(
    mirror: RedisMirror, server: RedisServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    registry = CalibrationRegistry(tmp_path / "first", mirror)
    large, small, other = stored(registry, LARGE), stored(registry, b"small"), stored(registry, b"other")
    with server.client() as client:
        client.delete(f"kvstore:calibrations:data:{large.digest.hex()}:1")
        client.set(f"kvstore:calibrations:data:{small.digest.hex()}:0", b"smaLl")
    successor = CalibrationRegistry(tmp_path / "second", mirror)
    assert successor.records() == (other,)
    assert caplog.text.count("cannot be read from the mirror") == 2
    # The disk that has them whole is not affected.
    assert read(CalibrationRegistry(tmp_path / "first", mirror), large) == LARGE


def test_the_order_is_that_of_the_mirror(mirror: RedisMirror, tmp_path: Path) -> None:
    alone = CalibrationRegistry(tmp_path / "first")
    first, second = stored(alone, b"first"), stored(alone, b"second")
    elsewhere = CalibrationRegistry(tmp_path / "second", mirror)
    stored(elsewhere, b"second")
    stored(elsewhere, b"first")
    assert CalibrationRegistry(tmp_path / "first", mirror).records() == (second, first)
