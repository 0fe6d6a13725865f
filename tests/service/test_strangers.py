"""Connections whose callers have not said who they are."""

import pytest

from kvstore_service.listen import network_of
from kvstore_service.strangers import Strangers


def test_who_opens_many_closes_their_own() -> None:
    strangers: Strangers[str] = Strangers(4)
    assert strangers.add("honest", "10.0.0.1") is None
    crowd = [f"flood-{number}" for number in range(20)]
    closed = [strangers.add(one, "10.0.0.2") for one in crowd]
    assert closed == [None] * 3 + crowd[:17]
    assert list(strangers) == ["honest", *crowd[17:]]


def test_of_one_network_the_oldest_is_closed() -> None:
    strangers: Strangers[int] = Strangers(2)
    assert [strangers.add(number, "10.0.0.1") for number in range(4)] == [None, None, 0, 1]
    strangers.remove(2)
    strangers.remove(2)
    assert strangers.add(4, "10.0.0.3") is None
    assert (len(strangers), 2 in strangers, 3 in strangers) == (2, False, True)


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
