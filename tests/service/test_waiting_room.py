"""Connections whose callers have not said who they are, and calls whose request has not come."""

import pytest

from kvstore_service.listen import network_of
from kvstore_service.waiting_room import WaitingRoom


def test_who_opens_many_closes_their_own() -> None:
    room: WaitingRoom[str] = WaitingRoom(4)
    assert room.add("honest", "10.0.0.1") is None
    crowd = [f"flood-{number}" for number in range(20)]
    closed = [room.add(one, "10.0.0.2") for one in crowd]
    assert closed == [None] * 3 + crowd[:17]
    assert list(room) == ["honest", *crowd[17:]]


def test_of_one_network_the_oldest_is_closed() -> None:
    room: WaitingRoom[int] = WaitingRoom(2)
    assert [room.add(number, "10.0.0.1") for number in range(4)] == [None, None, 0, 1]
    room.remove(2)
    room.remove(2)
    assert room.add(4, "10.0.0.3") is None
    assert (len(room), 2 in room, 3 in room) == (2, False, True)


@pytest.mark.parametrize(
    ("host", "network"),
    [
        ("10.0.0.7", "10.0.0.7"),
        ("::ffff:10.0.0.7", "10.0.0.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("pod", "pod"),
    ],
)
def test_one_host_is_one_network(host: str, network: str) -> None:
    assert network_of(host) == network
