"""Certificates and tokens that are replaced while clients store and read: no request fails."""

import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvstore_client import KVStoreClient, connect
from kvstore_service.identity import Credential, Scope, new_token
from kvstore_service.identity.credential import token_digest
from kvstore_service.identity.file import changing
from tests.authority import Authority
from tests.client.chunks import ids
from tests.service.observability.watched import fetch, put
from tests.service.test_cli import scratch, serving

__all__ = ["scratch"]

ROTATIONS = 3
WORKERS = 3
_CHUNKS = 2
_REQUESTS_OF_A_CLIENT = 20
"""Then a new client is made, which opens new connections: these use the replaced files."""
_TAKES_EFFECT_S = 3.0
"""Longer than files are read late: a second, on an idle machine."""


class Load:
    """Workers that store a text and read it back, without a pause, each with a client of its own."""

    def __init__(self, **settings: object) -> None:
        self._settings = settings
        self._ended = threading.Event()
        self._numbers = iter(range(1 << 30))
        self._lock = threading.Lock()
        self.times_s: list[float] = []
        """Of every put and every fetch."""
        self.failures: list[str] = []
        self.clients = 0

    def _count(self, began_s: float, done: int, what: str) -> None:
        with self._lock:
            self.times_s.append(time.monotonic() - began_s)
            if done != _CHUNKS:
                self.failures.append(f"{what}: {done} of {_CHUNKS} chunks")

    def _use(self, client: KVStoreClient) -> None:
        for _ in range(_REQUESTS_OF_A_CLIENT):
            if self._ended.is_set():
                return
            with self._lock:
                document = ids(_CHUNKS, seed=next(self._numbers))
            for what, call in (("put", put), ("fetch", fetch)):
                began_s = time.monotonic()
                self._count(began_s, call(client, document), what)

    def _work(self) -> None:
        while not self._ended.is_set():
            with connect(**self._settings) as client:  # type: ignore[arg-type]
                self._use(client)
                misses = {k: n for k, n in client.metrics.snapshot().items() if k.startswith("miss_") and n}
            with self._lock:
                self.clients += 1
                if misses:
                    self.failures.append(str(misses))

    @contextmanager
    def running(self) -> Iterator[None]:
        threads = [threading.Thread(target=self._work) for _ in range(WORKERS)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._ended.set()
            for thread in threads:
                thread.join()

    def report(self) -> str:
        times_s = sorted(self.times_s)
        p50_s, p99_s = (times_s[int(share * len(times_s))] for share in (0.5, 0.99))
        return (
            f"{len(times_s)} puts and fetches of {self.clients} clients, {len(self.failures)} failed: "
            f"p50 {1e3 * p50_s:.1f} ms, p99 {1e3 * p99_s:.1f} ms"
        )


def add_token(file: Path) -> tuple[str, str]:
    """The id and the token of a new credential of a worker."""
    made_id, token = new_token()
    with changing(file) as known:
        known.append(
            Credential(
                made_id,
                "worker",
                "acme",
                frozenset({Scope.DATA}),
                token_digest(token),
                expires_unix_s=time.time() + 3600,
            )
        )
    return made_id, token


def revoke(file: Path, revoked: str) -> None:
    with changing(file) as known:
        known[:] = [one for one in known if one.id != revoked]


def presented(address: str) -> str:
    """The certificate of the server at an address, PEM."""
    host, _, port = address.rpartition(":")
    return ssl.get_server_certificate((host, int(port)), timeout=10)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_no_request_fails_while_certificates_and_tokens_are_replaced(scratch: Path, tmp_path: Path) -> None:
    authority = Authority(tmp_path / "files")
    server, own = authority.sign("server"), authority.sign("worker")
    file, token_file = tmp_path / "credentials.json", tmp_path / "worker.token"
    current, first_token = add_token(file)
    token_file.write_text(first_token)
    service = {
        "--tls-cert": server.certificate,
        "--tls-key": server.key,
        "--tls-ca": authority.certificate,
        "--tls-client-ca": authority.certificate,
        "--credentials": file,
        "--nodes": 2,
    }
    with serving(scratch, *(str(part) for option in service.items() for part in option)) as (
        process,
        address,
    ):
        tls = {"tls_ca": authority.certificate, "tls_cert": own.certificate, "tls_key": own.key}
        load = Load(address=address, token_file=token_file, lookup_timeout_s=20.0, **tls)
        with load.running():
            for _ in range(ROTATIONS):
                time.sleep(_TAKES_EFFECT_S)
                before = presented(address)
                authority.sign("server")
                authority.sign("worker")
                added, token = add_token(file)
                time.sleep(_TAKES_EFFECT_S)
                token_file.write_text(token)
                time.sleep(_TAKES_EFFECT_S)
                revoke(file, current)
                current = added
                assert presented(address) != before
            time.sleep(_TAKES_EFFECT_S)
        with connect(address, token=first_token, **tls) as revoked:  # type: ignore[arg-type]
            assert fetch(revoked, ids(_CHUNKS)) == 0
            assert any(name.startswith("miss_") for name in revoked.metrics.snapshot())
        process.terminate()
        assert process.wait(60) == 0
    print(load.report())
    assert load.failures == []
    assert load.clients > WORKERS * ROTATIONS
