import socket

import pytest

from kvstore_cluster.arena import Arena
from kvstore_cluster.node import StorageNode
from kvstore_codec.errors import AddressInUseError, ConfigurationError
from kvstore_service.grpc_server import GrpcServer
from kvstore_service.grpc_storage import StorageService
from kvstore_service.listen import Address, Reservation

ANY = Address("127.0.0.1", 0)


@pytest.mark.parametrize("text", ["127.0.0.1:80", "localhost:0", "[::1]:65535"])
def test_addresses_read_as_they_are_written(text: str) -> None:
    assert str(Address.parse(text)) == text


@pytest.mark.parametrize(
    "text", ["", "host", ":80", "host:", "host:x", "host:-1", "host:65536", "::1:80", "h:²"]
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match="write host:port"):
        Address.parse(text)


def test_all_interfaces_are_reached_at_a_real_address() -> None:
    assert Address("127.0.0.1", 1).reachable_host == "127.0.0.1"
    assert Address("kv.example", 1).reachable_host == "kv.example"
    assert Address("0.0.0.0", 1).reachable_host not in ("0.0.0.0", "")  # noqa: S104


def test_a_reserved_port_is_refused_to_others_but_not_to_the_server_it_is_for() -> None:
    reservation = Reservation(ANY)
    assert reservation.address.port > 0
    with pytest.raises(AddressInUseError, match="in use"):
        Reservation(reservation.address)
    handlers = StorageService(StorageNode("n", Arena(1 << 20))).handlers()
    for _ in range(2):  # a server that crashed gets the same port again
        server = GrpcServer(reservation.address, "kvstore.v1.Storage", handlers)
        assert server.address == str(reservation.address)
        with pytest.raises(AddressInUseError, match="in use"):
            Reservation(reservation.address)
        server.stop(0)
    reservation.release()
    Reservation(reservation.address).release()


def test_a_port_where_somebody_listens_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(AddressInUseError, match=f"127.0.0.1:{port}: Address already in use; .*--listen"):
            Reservation(Address("127.0.0.1", port))


def test_a_host_of_another_machine_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"192.0.2.1:0: .* not an address of this machine; choose"):
        Reservation(Address("192.0.2.1", 0))
    with pytest.raises(ConfigurationError, match="cannot listen on"):
        Reservation(Address("no such host", 0))
    with pytest.raises(ConfigurationError, match="is not a valid host name"):
        Reservation(Address("a" * 70 + ".example", 0))


def test_a_server_that_cannot_bind_says_so() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other, pytest.raises(AddressInUseError):
        GrpcServer(Address("127.0.0.1", other.getsockname()[1]), "kvstore.v1.Storage", {})
