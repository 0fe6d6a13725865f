"""The ports of the publisher, and connections that never say what they are."""

import socket

import pytest

from kvstore_service.events import sockets
from kvstore_service.events.sockets import EventSockets
from kvstore_service.listen import Address, two_free_ports


def test_a_connection_without_a_handshake_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "HANDSHAKE_S", 0.2)
    made = EventSockets(two_free_ports(Address("127.0.0.1", 0)), None)
    for address in made.addresses:
        with socket.create_connection((address.host, address.port), 5) as silent:
            silent.settimeout(20)
            while silent.recv(1 << 10):  # the publisher's own greeting
                pass
    made.close()
