"""A disk that is made slow: readers together get no more than it has."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore_cluster.slow_disk import SlowStore
from kvstore_codec.errors import ConfigurationError
from tests.cluster.disk.chunks import append, read
from tests.sample_chunk import sample_chunk

CHUNK = sample_chunk(frame_bytes=24_000)
SIZE = len(CHUNK.data)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SlowStore]:
    store = SlowStore(tmp_path / "store", 64 << 20)
    store.recover()
    yield store
    store.close()


def test_readers_share_the_speed_until_it_is_taken_away(store: SlowStore) -> None:
    location = append(store, CHUNK)
    store.read_speed.set(4e6)
    readers = [threading.Thread(target=read, args=(store, location, SIZE)) for _ in range(3)]
    began_s = time.monotonic()
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    slow_s = time.monotonic() - began_s
    assert slow_s >= 3 * SIZE / 4e6 > 0.15
    store.read_speed.set(None)
    began_s = time.monotonic()
    assert read(store, location, SIZE) == CHUNK.data
    assert time.monotonic() - began_s < slow_s / 3


def test_an_idle_disk_saves_nothing_up(store: SlowStore) -> None:
    location = append(store, CHUNK)
    store.read_speed.set(4e6)
    for _ in range(2):
        time.sleep(0.1)
        began_s = time.monotonic()
        assert read(store, location, SIZE) == CHUNK.data
        assert time.monotonic() - began_s >= SIZE / 4e6


def test_whoever_waits_goes_on_when_the_limit_is_lifted(store: SlowStore) -> None:
    location = append(store, CHUNK)
    store.read_speed.set(1e6)
    readers = [threading.Thread(target=read, args=(store, location, SIZE)) for _ in range(60)]
    for reader in readers:
        reader.start()
    time.sleep(0.05)
    assert any(reader.is_alive() for reader in readers)
    store.read_speed.set(None)
    for reader in readers:
        reader.join(60)
    assert not any(reader.is_alive() for reader in readers)


def test_a_speed_that_no_disk_has_is_refused(store: SlowStore) -> None:
    for speed in (0.0, 1e3, 1e15):
        with pytest.raises(ConfigurationError, match="1 MB/s or more"):
            store.read_speed.set(speed)
    assert store.read_speed.limit_bytes_per_s is None
