"""The catalogue in a real Redis: one coordinator at a time, and Redis may go and come back."""

import logging
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from kvstore_api.placement import Member
from kvstore_cluster.catalogue import Catalogue, ClusterState, NodeRecord, RedisCatalogue
from kvstore_cluster.coordinator import Coordinator
from kvstore_codec.errors import CatalogueError, ConfigurationError
from tests.redis_server import PASSWORD, RedisServer
from tests.sample_chunk import sample_chunk

FIRST, SECOND = sample_chunk(1).chunk_id, sample_chunk(2).chunk_id
STATE = ClusterState(
    7,
    (NodeRecord(Member("node-0", "h:1", 2.5), 11, alive=True),),
    pins={"": frozenset({FIRST})},
    quotas={"blue": 1 << 60},
    draining=frozenset({"b"}),
    repair_round=3,
    changes=2,
)
A, B = Member("a", "host:1"), Member("b", "host:2")
DOCUMENT = "kvstore:catalogue:document"
PATIENCE_S = 60.0
"""How long a test waits for another thread."""


@pytest.fixture
def server() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


@pytest.fixture
def catalogue(server: RedisServer) -> Iterator[RedisCatalogue]:
    catalogue = RedisCatalogue(server.url)
    yield catalogue
    catalogue.close()


class HeldSaves:
    """Holds each save of a catalogue until it is let go, and counts the saves of each thread."""

    def __init__(self, catalogue: RedisCatalogue, monkeypatch: pytest.MonkeyPatch) -> None:
        self._catalogue, self._patch, self._save = catalogue, monkeypatch, catalogue.save
        self._begun, self._permits, self._ended = (threading.Semaphore(0) for _ in range(3))
        self._threads: list[threading.Thread] = []
        monkeypatch.setattr(catalogue, "save", self._held)

    def wait_for_one(self) -> None:
        """Returns when a save is being held."""
        assert self._begun.acquire(timeout=PATIENCE_S)

    def let_one_go(self) -> None:
        """Returns when a held save has ended."""
        self._permits.release()
        assert self._ended.acquire(timeout=PATIENCE_S)

    def none_ended(self) -> bool:
        return not self._ended.acquire(blocking=False)

    def of_this_thread(self) -> int:
        return self._threads.count(threading.current_thread())

    def let_all_go(self) -> None:
        self._patch.setattr(self._catalogue, "save", self._save)
        self._permits.release(100)

    def _held(self, state: ClusterState) -> None:
        self._threads.append(threading.current_thread())
        self._begun.release()
        self._permits.acquire(timeout=PATIENCE_S)
        try:
            self._save(state)
        finally:
            self._ended.release()


def wait_for(condition: Callable[[], bool], patience_s: float = 15) -> None:
    deadline_s = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def test_what_was_saved_is_loaded_by_the_next(server: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    first = RedisCatalogue(server.url)
    assert first.load() == ClusterState()
    assert "a new cluster begins" in caplog.text
    caplog.clear()
    first.save(ClusterState(6))
    first.save(STATE)
    first.close()
    second = RedisCatalogue(server.url)
    assert second.load() == STATE
    second.save(ClusterState(8))
    second.close()
    assert caplog.text == ""
    # Nothing but the named keys, and no lock left behind.
    with server.client() as client:
        assert set(client.keys()) == {DOCUMENT.encode(), b"kvstore:catalogue:revision"}


def test_namespaces_are_apart(server: RedisServer, catalogue: RedisCatalogue) -> None:
    other = RedisCatalogue(server.url, namespace="other")
    catalogue.save(STATE)
    assert other.load() == ClusterState()
    other.close()


def test_a_coordinator_that_hung_cannot_write_after_its_successor(
    server: RedisServer, catalogue: RedisCatalogue
) -> None:
    catalogue.save(ClusterState(1))
    # What a pause longer than the lock's life looks like.
    with server.client() as client:
        client.delete("kvstore:catalogue:owner")
    successor = RedisCatalogue(server.url)
    assert successor.load() == ClusterState(1)
    with pytest.raises(CatalogueError, match="another coordinator has the catalogue"):
        catalogue.save(ClusterState(5))
    successor.save(ClusterState(2))
    successor.close()
    # The lock is free, but the state is newer than what this one knows.
    with pytest.raises(CatalogueError, match="another coordinator has the catalogue"):
        catalogue.save(ClusterState(5))
    third = RedisCatalogue(server.url)
    assert third.load() == ClusterState(2)
    third.close()


def test_of_many_that_start_at_once_one_writes(server: RedisServer) -> None:
    opened: list[Catalogue] = []
    refused: list[str] = []

    def start() -> None:
        try:
            opened.append(RedisCatalogue(server.url))
        except CatalogueError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(opened), len(refused)) == (1, 3)
    assert all("in use by another coordinator" in reason for reason in refused)
    opened[0].save(STATE)
    assert opened[0].load() == STATE
    opened[0].close()


def test_a_wiped_redis_is_given_the_state_again_and_it_is_said(
    server: RedisServer, catalogue: RedisCatalogue, caplog: pytest.LogCaptureFixture
) -> None:
    catalogue.save(STATE)
    server.kill()
    server.start()
    with server.client() as client:
        wait_for(lambda: client.exists(DOCUMENT) == 1)
    assert "lost the cluster's state" in caplog.text
    assert catalogue.load() == STATE


def test_an_older_snapshot_is_overwritten(
    server: RedisServer, catalogue: RedisCatalogue, caplog: pytest.LogCaptureFixture
) -> None:
    catalogue.save(ClusterState(1))
    with server.client() as client:
        old = client.mget(DOCUMENT, "kvstore:catalogue:revision")
        catalogue.save(STATE)
        client.mset({DOCUMENT: old[0], "kvstore:catalogue:revision": old[1]})
        wait_for(lambda: client.get(DOCUMENT) != old[0])
    assert "had revision 1 instead of 2" in caplog.text
    assert catalogue.load() == STATE


def test_damage_is_refused(server: RedisServer, catalogue: RedisCatalogue) -> None:
    catalogue.save(STATE)
    with server.client() as client:
        sound = client.get(DOCUMENT)
        for damaged in (b"", b"\xff", sound[: len(sound) // 2], sound.replace(b"blue", b"bloe")):
            client.set(DOCUMENT, damaged)
            with pytest.raises(CatalogueError, match=f"catalogue {DOCUMENT} in Redis at .* is damaged"):
                catalogue.load()
        client.set(DOCUMENT, sound)


def test_the_cluster_goes_on_while_redis_is_away(
    server: RedisServer,
    catalogue: RedisCatalogue,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    coordinator = Coordinator(catalogue)
    coordinator.join(A, 1)
    coordinator.pin([FIRST])
    server.kill()
    saving, save = [], catalogue.save

    def counted_save(state: ClusterState) -> None:
        saving.append(threading.current_thread())
        save(state)

    monkeypatch.setattr(catalogue, "save", counted_save)
    assert coordinator.join(B, 1).members == (A, B)
    coordinator.mark_dead("a", 1, "silent")
    assert coordinator.membership().members == (B,)
    for decide in (lambda: coordinator.pin([SECOND]), lambda: coordinator.drain("b"), coordinator.repair):
        with pytest.raises(CatalogueError, match="cannot be used"):
            decide()
    assert coordinator.pins() == {FIRST}
    assert saving.count(threading.current_thread()) == 4, "each call but `mark_dead` tries once"
    server.start()
    with server.client() as client:
        wait_for(lambda: b'"silent"' in (client.get(DOCUMENT) or b""))
    wait_for(lambda: catalogue.load().epoch == coordinator.membership().epoch)
    assert coordinator.pin([SECOND]) == 2
    coordinator.close()
    assert catalogue.load().pins == {"": {FIRST, SECOND}}
    assert PASSWORD not in caplog.text
    assert "secret" not in caplog.text


def test_nobody_waits_for_a_redis_that_hangs(
    server: RedisServer, catalogue: RedisCatalogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    coordinator = Coordinator(catalogue)
    coordinator.join(A, 1)
    coordinator.join(B, 1)
    saves = HeldSaves(catalogue, monkeypatch)
    server.hang()
    coordinator.mark_dead("a", 1, "silent")
    assert coordinator.membership().members == (B,)
    saves.wait_for_one()
    assert saves.none_ended(), "Redis was waited for"
    saves.let_one_go()
    # From then on it is known to be away.
    saves.wait_for_one()
    coordinator.mark_alive("a", 1)
    assert coordinator.join(B, 2).members == (A, B)
    assert saves.none_ended(), "Redis was waited for"
    assert saves.of_this_thread() == 0
    saves.let_all_go()
    with pytest.raises(CatalogueError, match="cannot be used"):
        coordinator.pin([FIRST])
    server.go_on()
    wait_for(lambda: coordinator.pin([FIRST]) == 1)
    wait_for(lambda: catalogue.load().epoch == coordinator.membership().epoch)
    coordinator.close()


def test_the_password_is_in_no_message(server: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    host = f"127.0.0.1:{server.port}"
    for url, kind in (
        (f"redis://:wrong-hunter2@{host}", CatalogueError),
        ("redis://user:hunter2@127.0.0.1:1/0", CatalogueError),
        ("http://user:hunter2@127.0.0.1", ConfigurationError),
        ("redis://user:hun/ter2@127.0.0.1:6379", ConfigurationError),
        ("redis://user:hunter2@127.0.0.1:notaport", ConfigurationError),
        ("redis://127.0.0.1:6379/?socket_timeout=hunter2", ConfigurationError),
    ):
        with pytest.raises(kind) as raised:
            RedisCatalogue(url)
        assert "ter2" not in str(raised.value)
        assert raised.value.__cause__ is None or "ter2" not in str(raised.value.__cause__)
    assert "ter2" not in caplog.text
