"""Clients of a service with credentials and TLS."""

import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvstore_client import KVStoreClient, connect
from kvstore_client.connector import Connector
from kvstore_client.new_chunk import NewChunk
from kvstore_client.settings import SecuritySettings
from kvstore_codec.errors import ConfigurationError
from kvstore_service.cli.app import app
from kvstore_service.identity import Scope
from tests.authority import Authority
from tests.client.chunks import SPEC, ids, random_kv
from tests.clock import Clock
from tests.service.secured import SecuredCluster

CHUNKS = ids(2)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture
def cluster(tmp_path: Path, authority: Authority) -> Iterator[SecuredCluster]:
    pair = authority.sign("server")
    made = SecuredCluster(tmp_path, tls_cert=pair.certificate, tls_key=pair.key, tls_ca=authority.certificate)
    yield made
    made.close()


def worker(cluster: SecuredCluster, authority: Authority, **settings: object) -> KVStoreClient:
    return connect(cluster.front.address, tls_ca=authority.certificate, **settings)


def store(client: KVStoreClient) -> int:
    chunks = [NewChunk(id_, lambda: random_kv(0)) for id_ in CHUNKS]
    return client.store.put(SPEC, chunks).result(timeout=60)


def fetched(client: KVStoreClient) -> int:
    """Number of chunks that arrive."""
    match = client.match(SPEC, CHUNKS)
    return client.fetch(match, client.buffers.acquire(SPEC, match.tokens), None).wait().fetched


def test_workers_of_two_tenants_share_a_cluster_and_nothing_else(
    cluster: SecuredCluster, authority: Authority
) -> None:
    """Although they name the same chunks: neither has a salt."""
    with (
        worker(cluster, authority, token=cluster.token("a")) as ours,
        worker(cluster, authority, token=cluster.token("b")) as theirs,
    ):
        assert store(ours) == 2
        assert len(ours.match(SPEC, CHUNKS, peek=True).chunks) == 2
        assert not theirs.match(SPEC, CHUNKS, peek=True).chunks
        assert store(theirs) == 2
        assert {variant.tenant for variant in cluster.node.list()[0]} == {"a", "b"}
        for client in (ours, theirs):
            assert fetched(client) == 2


def test_a_worker_of_every_tenant_says_whom_it_works_for(
    cluster: SecuredCluster, authority: Authority
) -> None:
    token = cluster.token(None)
    with worker(cluster, authority, token=token, tenant="a") as first:
        assert store(first) == 2
    with worker(cluster, authority, token=token, tenant="b") as second:
        assert not second.match(SPEC, CHUNKS, peek=True).chunks
    with worker(cluster, authority, token=token, tenant="a") as third:
        assert len(third.match(SPEC, CHUNKS, peek=True).chunks) == 2


@pytest.mark.parametrize("wrong", ["no token", "a revoked token", "no TLS"])
def test_a_worker_that_is_refused_computes(
    cluster: SecuredCluster, authority: Authority, wrong: str, caplog: pytest.LogCaptureFixture
) -> None:
    token = cluster.token("a")
    settings: dict[str, object] = {"tls_ca": authority.certificate, "token": token}
    if wrong == "no token":
        del settings["token"]
    if wrong == "no TLS":
        del settings["tls_ca"]
    if wrong == "a revoked token":
        cluster.revoke(token)
    with caplog.at_level(logging.INFO), connect(cluster.front.address, **settings) as client:
        assert not client.match(SPEC, CHUNKS).chunks
        assert store(client) == 0
    assert token not in caplog.text
    if wrong != "no TLS":
        assert "refused this client" in caplog.text


def test_a_token_is_replaced_under_load(
    cluster: SecuredCluster, authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvstore_client.reloaded_files.CHECK_PERIOD_S", 0.0)
    file = tmp_path / "token"
    old = cluster.token("a")
    file.write_text(old + "\n")
    failed: list[object] = []
    rounds = threading.Semaphore(0)
    over = threading.Event()
    with worker(cluster, authority, token_file=file) as client:
        assert store(client) == 2

        def work() -> None:
            while not over.is_set():
                if len(client.match(SPEC, CHUNKS, peek=True).chunks) != 2:
                    failed.append("a lookup")
                if fetched(client) != 2:
                    failed.append("a fetch")
                rounds.release()

        thread = threading.Thread(target=work)
        thread.start()
        try:
            for change in (
                lambda: None,
                lambda: file.write_text(cluster.token("a")),
                lambda: cluster.revoke(old),
            ):
                change()
                for _ in range(3):
                    assert rounds.acquire(timeout=60)
        finally:
            over.set()
            thread.join()
    assert not failed


def test_a_token_is_never_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    token = "kvs_0123456789abcdef_" + "5" * 64
    settings = SecuritySettings(token=token)  # type: ignore[arg-type]
    assert token not in repr(settings) + str(settings)
    for wrong in (token + "\x00", token * 8, "two words"):
        with pytest.raises(ConfigurationError) as refusal:
            connect("127.0.0.1:1", token=wrong)
        assert token not in str(refusal.value)
        monkeypatch.setenv("KVSTORE_TOKEN", wrong.replace("\x00", "\x01"))
        result = CliRunner().invoke(app, ["ls"])
        assert isinstance(result.exception, ConfigurationError)
        assert token not in str(result.exception)


@pytest.mark.parametrize("content", ["", " \n", "two words", None])
def test_a_file_without_a_token_is_named(tmp_path: Path, content: str | None) -> None:
    file = tmp_path / "token"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigurationError, match=str(file)):
        Connector(SecuritySettings(token_file=file))


def test_a_token_file_that_becomes_unusable_is_logged_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file, clock = tmp_path / "token", Clock()
    file.write_text("first")
    connector = Connector(SecuritySettings(token_file=file), clock)
    for change in (lambda: file.unlink(), lambda: None, lambda: file.write_text("second")):
        assert connector.token() == "first"
        change()
        clock.now_s += 10
    assert connector.token() == "second"
    assert caplog.text.count("stays in use") == 1


def test_commands_use_the_credential_of_their_environment(
    cluster: SecuredCluster, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kvstore(token: str, *arguments: str) -> str:
        monkeypatch.setenv("KVSTORE_TOKEN", token)
        result = CliRunner().invoke(app, [*arguments, "--address", cluster.front.address])
        return result.output if result.exception is None else str(result.exception)

    monkeypatch.setenv("KVSTORE_TLS_CA", str(authority.certificate))
    with worker(cluster, authority, token=cluster.token("a")) as client:
        store(client)
    operator, own, data = (
        cluster.token(None, Scope.ADMIN),
        cluster.token("a", Scope.ADMIN),
        cluster.token("b"),
    )
    assert "node-0" in kvstore(operator, "status")
    assert "concerns every tenant" in kvstore(own, "status")
    assert "2 chunks" in kvstore(own, "verify")
    assert '"chunks": []' in kvstore(data, "ls", "--json")
    chunk = CHUNKS[0].content_id.hex()[:12]
    assert "pinned 1 chunk" in kvstore(own, "pin", chunk)
    assert len(cluster.coordinator.pins("a")) == 1
    assert "evicted 0 chunks" in kvstore(data, "evict", "--all", "--yes")
    assert "evicted 1 chunks" in kvstore(operator, "evict", chunk, "--yes")
    assert "needs a credential" in kvstore("", "ls")
    assert cluster.node.stats().chunks == 1
