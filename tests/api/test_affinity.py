"""Where the threads of a connection run."""

import os
import socket
from collections.abc import Iterator

import pytest

from kvstore_api.affinity import Affinity, AnyProcessor, SharedProcessor, shared_where_local, unpinned

pytestmark = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="there is one processor only")


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        server, _ = listener.accept()
        with client, server:
            yield client, server


@pytest.fixture(autouse=True)
def restored() -> Iterator[set[int]]:
    """The thread may run anywhere again after the test."""
    allowed = os.sched_getaffinity(0)
    yield allowed
    os.sched_setaffinity(0, allowed)


def within(affinity: Affinity, *, anew: bool) -> set[int]:
    with affinity.staying(anew=anew):
        return os.sched_getaffinity(0)


def test_a_client_stays_where_its_request_began(
    ends: tuple[socket.socket, socket.socket], restored: set[int]
) -> None:
    affinity = SharedProcessor(ends[0])
    (first,) = within(affinity, anew=True)
    assert within(affinity, anew=False) == {first}
    assert os.sched_getaffinity(0) == restored
    other = min(restored - {first})
    os.sched_setaffinity(0, {other})
    assert within(affinity, anew=True) == {other}


def test_a_server_joins_its_client(ends: tuple[socket.socket, socket.socket], restored: set[int]) -> None:
    """The kernel knows where a message was received: on loopback, where its sender ran."""
    client, server = ends
    affinity = SharedProcessor(server)
    for processor in (*sorted(restored), min(restored)):
        os.sched_setaffinity(0, {processor})
        client.send(b"?")
        os.sched_setaffinity(0, restored)
        server.recv(1)
        affinity.join_peer()
        assert os.sched_getaffinity(0) == {processor}


def test_the_policy_pins_only_where_both_ends_are_on_this_machine(
    ends: tuple[socket.socket, socket.socket], restored: set[int]
) -> None:
    assert isinstance(shared_where_local(ends[0]), SharedProcessor)
    affinity = unpinned(ends[0])
    assert isinstance(affinity, AnyProcessor)
    assert within(affinity, anew=True) == restored
    affinity.join_peer()
    assert os.sched_getaffinity(0) == restored
