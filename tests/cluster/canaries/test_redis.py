"""Canaries with copies in a real Redis: they outlive the coordinator's disk."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore_cluster.canaries import CanaryRegistry, RedisCanaryMirror
from kvstore_codec.errors import CatalogueError
from tests.cluster.canaries.test_registry import MODEL, OTHER, RIGHT, WRONG, sketch
from tests.redis_server import RedisServer


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


@pytest.fixture
def mirror(server: RedisServer) -> Iterator[RedisCanaryMirror]:
    with server.client() as client:
        client.flushall()
    mirror = RedisCanaryMirror(server.url)
    yield mirror
    mirror.close()


def test_canaries_and_replacements_outlive_the_disk(mirror: RedisCanaryMirror, tmp_path: Path) -> None:
    registry = CanaryRegistry(tmp_path / "first", mirror)
    registry.put(MODEL, 0, RIGHT, sketch(1))
    registry.put(OTHER, 0, WRONG, sketch(2, OTHER))
    registry.replace(OTHER)
    successor = CanaryRegistry(tmp_path / "second", mirror)
    assert successor.get(MODEL) == registry.get(MODEL)
    assert successor.get(OTHER)[0].generation == 1
    assert successor.changes_of() == 1


def test_that_a_model_was_forgotten_outlives_the_disk(mirror: RedisCanaryMirror, tmp_path: Path) -> None:
    registry = CanaryRegistry(tmp_path / "first", mirror, max_models=1)
    registry.put(MODEL, 0, RIGHT, sketch(1))
    registry.put(OTHER, 0, WRONG, sketch(2, OTHER))
    successor = CanaryRegistry(tmp_path / "second", mirror, max_models=1)
    assert successor.get(MODEL)[0].generation == registry.get(MODEL)[0].generation == 1
    assert successor.get(OTHER) == registry.get(OTHER)


def test_a_wiped_redis_gets_its_copies_again(
    mirror: RedisCanaryMirror, server: RedisServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    CanaryRegistry(tmp_path / "first", mirror).put(MODEL, 0, RIGHT, sketch(1))
    with server.client() as client:
        client.flushall()
    CanaryRegistry(tmp_path / "first", mirror)
    assert "was not in the mirror" in caplog.text
    assert CanaryRegistry(tmp_path / "second", mirror).get(MODEL)[1] == sketch(1)


def test_the_later_generation_counts(mirror: RedisCanaryMirror, tmp_path: Path) -> None:
    alone = CanaryRegistry(tmp_path / "first")
    alone.put(MODEL, 0, WRONG, sketch(2))
    alone.replace(MODEL)
    CanaryRegistry(tmp_path / "second", mirror).put(MODEL, 0, WRONG, sketch(2))
    assert CanaryRegistry(tmp_path / "first", mirror).get(MODEL)[0].generation == 1
    assert CanaryRegistry(tmp_path / "third", mirror).get(MODEL)[0].generation == 1


def test_without_redis_they_can_be_read_but_not_made(tmp_path: Path) -> None:
    with RedisServer() as another:
        mirror = RedisCanaryMirror(another.url)
        registry = CanaryRegistry(tmp_path, mirror)
        made = registry.put(MODEL, 0, RIGHT, sketch(1))
        another.kill()
        for change in (
            lambda: registry.put(OTHER, 0, RIGHT, sketch(1, OTHER)),
            lambda: registry.replace(MODEL),
        ):
            with pytest.raises(CatalogueError, match="cannot be used"):
                change()
        assert registry.get(MODEL) == made
        assert registry.changes_of() == 0
        another.start()
        registry.replace(MODEL)
        mirror.close()


def test_damage_in_redis_is_noticed(
    mirror: RedisCanaryMirror, server: RedisServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    CanaryRegistry(tmp_path / "first", mirror).put(MODEL, 0, RIGHT, sketch(1))
    with server.client() as client:
        client.hset("kvstore:canaries", MODEL.hex(), b"0:nonsense")
        client.hset("kvstore:canaries", "zz" * 32, b"0:nonsense")
        client.hset("kvstore:canaries", OTHER.hex(), b"")
    assert CanaryRegistry(tmp_path / "second", mirror).records() == ()
    assert "is damaged" in caplog.text
    assert CanaryRegistry(tmp_path / "first", mirror).get(MODEL)[1] == sketch(1)
