"""An honest client of a coordinator, a node and its bulk port during floods: benchmarks/floods.py in small."""

import importlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.authority import Authority
from tests.sample_chunk import sample_chunk
from tests.service.secured import SecuredCluster
from tests.service.storage_calls import wait_until

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
FLOODS = {
    "connections": 500,
    "slow requests": 60,
    "half-open TLS handshakes": 60,
    "calls without a request": 720,
    "lookups of one tenant": 400,
    "puts that never end": 80,
}
"""The number of connections or calls of each."""
FLOOD_S = 2.0
NOISE_DESCRIPTORS = 4


@pytest.fixture
def flooded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """What the attacks take for a running service, with TLS and credentials."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    authority = Authority(tmp_path / "files")
    pair, ca = authority.sign("server"), authority.certificate
    cluster = SecuredCluster(tmp_path, tls_cert=pair.certificate, tls_key=pair.key, tls_ca=ca)
    ports = {
        "coordinator": cluster.front.address,
        "node": cluster.storage.address,
        "bulk": cluster.bulk.address,
    }
    tokens = {"honest": cluster.token("acme"), "rival": cluster.token("rival")}
    yield importlib.import_module("flood_target").Target(ports, ca, cluster.file, tokens)
    cluster.close()


@pytest.mark.slow
def test_honest_requests_are_answered_during_floods_and_no_descriptor_is_left(flooded: Any) -> None:
    attacks = importlib.import_module("flood_attacks").ATTACKS
    honest = importlib.import_module("flood_honest").Client(flooded)
    answered = dict.fromkeys(FLOODS, 0)
    _ask(honest, 0)
    descriptors = psutil.Process().num_fds()
    for name, count in FLOODS.items():
        flood = threading.Thread(target=attacks[name][0], args=(flooded, count, time.monotonic() + FLOOD_S))
        flood.start()
        while flood.is_alive():
            answered[name] += 1
            _ask(honest, answered[name])
        flood.join()
    assert all(answered.values()), answered
    wait_until(lambda: psutil.Process().num_fds() <= descriptors + NOISE_DESCRIPTORS)
    _ask(honest, 0)
    honest.close()


def _ask(honest: Any, number: int) -> None:
    """Raises TransferError and grpc.RpcError if one of the three requests fails."""
    chunk = sample_chunk(number % 64, frame_bytes=500)
    for request in (honest.put, honest.lookup, honest.get):
        request(chunk)
