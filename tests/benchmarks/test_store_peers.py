"""The peers' `store.py`: what `kvstore bench store` relies on."""

import subprocess
import sys

import pytest

from kvstore_bench.store.processes import Process
from kvstore_bench.store.systems import SYSTEMS, System

PEERS = [system for system in SYSTEMS if system.install]


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
def test_a_peer_finds_the_shared_loop_with_the_standard_library_alone(peer: System) -> None:
    script = peer.group.server[1]
    started = subprocess.run(
        [sys.executable, "-I", "-S", script], capture_output=True, text=True, check=False
    )
    missing = {"redis": "redis", "mooncake": "mooncake", "lmcache": "torch"}[peer.name]
    assert f"No module named '{missing}'" in started.stderr  # imported after `loop` and `ports`


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
def test_a_peer_keeps_what_is_put_and_is_timed(peer: System) -> None:
    if not peer.is_installed:
        pytest.skip(f"not installed; run: {peer.install}")
    server = Process(peer.name, peer.group.server)
    client = Process(peer.name, [*peer.group.client, server.line()])
    client.tell("resident", size_bytes=64 << 10, keys=[0, 1, 2])
    for method in peer.methods.values():
        client.tell("time", method=method, seconds=0.1)
    for command in ("check", "forget"):
        client.tell(command)
    answers = [client.answer(60) for _ in range(5)]
    client.close()
    server.close()
    assert answers[0] is answers[3] is answers[4] is None
    assert all(min(times) > 0 for times in answers[1:3])
