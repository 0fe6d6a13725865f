"""The bulk port against callers that do not say who they are, and tenants that take all places."""

import contextlib
import select
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore_api.frames import PREFACE, FrameKind, pack_header
from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_service.bulk_server import BulkServer
from kvstore_service.listen import Address
from tests.service.bulk_port import CHUNK, answer, put_frame, reply, served_port, wait_until
from tests.service.secured import HOST, SecuredCluster


@contextlib.contextmanager
def limited(folder: Path, **options: float) -> Iterator[SecuredCluster]:
    """A cluster whose bulk port has these limits."""
    cluster = SecuredCluster(folder)
    cluster.bulk.stop(0)
    cluster.bulk = BulkServer(cluster.node, Address(HOST, 0), access=cluster.access, **options)  # type: ignore[arg-type]
    try:
        yield cluster
    finally:
        cluster.bulk.stop(0)
        cluster.close()


def has_stored(connected: socket.socket) -> bool:
    connected.sendall(put_frame() + CHUNK.data)
    return reply(connected).status in (pb.PUT_STATUS_STORED, pb.PUT_STATUS_ALREADY_STORED)


def test_strangers_take_no_place_of_identified_callers(tmp_path: Path) -> None:
    """However many come, and however long they wait."""
    with limited(tmp_path, max_connections=4, max_strangers=3, stranger_s=60) as cluster:
        token = cluster.token("acme")
        with contextlib.ExitStack() as connections:
            known = []
            for _ in range(4):
                known.append(connections.enter_context(cluster.bulk_connection(token)))
                assert has_stored(known[-1])
            for _ in range(20):
                connections.enter_context(cluster.bulk_connection())
            wait_until(lambda: len(cluster.bulk._connections) == 4 + 3)
            assert all(map(has_stored, known))
            known[0].close()
            assert has_stored(connections.enter_context(cluster.bulk_connection(token)))


def test_a_stranger_of_another_host_is_not_closed_for_a_crowd(tmp_path: Path) -> None:
    with limited(tmp_path, max_strangers=3, stranger_s=60) as cluster, contextlib.ExitStack() as connections:
        host, _, port = cluster.bulk.address.rpartition(":")
        honest = connections.enter_context(
            socket.create_connection((host, int(port)), 5, source_address=("127.0.0.2", 0))
        )
        wait_until(lambda: len(cluster.bulk._strangers) == 1)
        for _ in range(20):
            connections.enter_context(cluster.bulk_connection())
        wait_until(lambda: len(cluster.bulk._connections) == 3)
        token = cluster.token("acme")
        honest.sendall(PREFACE + pack_header(FrameKind.TOKEN, len(token)) + token.encode())
        assert has_stored(honest)


@pytest.mark.parametrize("sent", [b"", b"KV", PREFACE, PREFACE + pack_header(FrameKind.TOKEN, 99)])
def test_a_stranger_has_a_short_time_whatever_it_sends(tmp_path: Path, sent: bytes) -> None:
    with limited(tmp_path, stranger_s=0.3) as cluster:
        host, _, port = cluster.bulk.address.rpartition(":")
        with socket.create_connection((host, int(port)), 5) as connected:
            connected.sendall(sent)
            connected.settimeout(30)
            assert connected.recv(1) == b""
        wait_until(lambda: not cluster.bulk._connections)


def test_an_identified_caller_may_wait_longer_than_a_stranger(tmp_path: Path) -> None:
    with limited(tmp_path, stranger_s=0.2) as cluster:
        token = cluster.token("acme")
        with cluster.bulk_connection() as stranger, cluster.bulk_connection(token) as connected:
            assert stranger.recv(1) == b""
            assert has_stored(connected)


def test_one_tenant_leaves_places_for_others(tmp_path: Path) -> None:
    """Even if all its connections have a request in progress."""
    with limited(tmp_path, max_connections=4, max_of_tenant=3) as cluster, contextlib.ExitStack() as rest:
        greedy, other = cluster.token("greedy"), cluster.token("acme")
        for _ in range(3):
            busy = rest.enter_context(cluster.bulk_connection(greedy))
            busy.sendall(put_frame() + CHUNK.data[:1])
        wait_until(lambda: len(cluster.bulk._places) == 3 and not cluster.bulk._places.idle)
        one_more = rest.enter_context(cluster.bulk_connection(greedy))
        kind, text = answer(one_more)
        assert (kind, b"3 connections of this tenant" in text) == (FrameKind.REFUSED, True)
        assert has_stored(rest.enter_context(cluster.bulk_connection(other)))


def test_an_idle_connection_of_the_largest_tenant_is_closed_first(tmp_path: Path) -> None:
    with limited(tmp_path, max_connections=3) as cluster, contextlib.ExitStack() as rest:
        small = rest.enter_context(cluster.bulk_connection(cluster.token("small")))
        assert has_stored(small)
        token = cluster.token("large")
        large = [rest.enter_context(cluster.bulk_connection(token)) for _ in range(2)]
        assert all(map(has_stored, large))
        wait_until(lambda: len(cluster.bulk._places.idle) == 3)
        assert has_stored(rest.enter_context(cluster.bulk_connection(cluster.token("new"))))
        # One of the two, whichever the server has seen idle first.
        closed, _, _ = select.select(large, [], [], 10)
        assert [connection.recv(1) for connection in closed] == [b""]
        assert has_stored(small)


def test_a_refused_stranger_takes_little_memory_for_little_time() -> None:
    """It is a stranger until it has sent the preface, also where callers need no credential."""
    with served_port(stranger_s=0.3) as port, port.connected(b"GET / HTTP/1.1\r\n") as connected:
        kind, _ = answer(connected)
        assert kind == FrameKind.REFUSED
        wait_until(lambda: not port.server._connections)
