"""Listen addresses: parsing, checking that they are free, and reserving them until a server starts."""

import errno
import ipaddress
import re
import socket
from dataclasses import dataclass

from kvstore_codec.errors import AddressInUseError, ConfigurationError

_PORT = re.compile("[0-9]{1,5}")


@dataclass(frozen=True, slots=True)
class Address:
    """host:port; port 0 means any free port. An IPv6 host is written in brackets."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> "Address":
        """Raises ConfigurationError for anything that is not host:port."""
        host, colon, port = text.rpartition(":")
        bracketed = host.startswith("[") and host.endswith("]")
        if (
            not (colon and host and _PORT.fullmatch(port) and int(port) < 1 << 16)
            or (":" in host and not bracketed)
            or not all(character.isprintable() and not character.isspace() for character in host)
        ):
            raise ConfigurationError(f"{text!r} is not an address; write host:port, such as 127.0.0.1:7420")
        return cls(host.strip("[]"), int(port))

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the address. False for a name that cannot be resolved."""
        try:
            found = socket.getaddrinfo(self.host, None, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            return False
        return all(ipaddress.ip_address(str(target[0]).partition("%")[0]).is_loopback for *_, target in found)

    @property
    def reachable_host(self) -> str:
        """Host that others connect to: the host itself, or for "all interfaces" this machine's outgoing address."""
        try:
            wildcard = ipaddress.ip_address(self.host).is_unspecified
        except ValueError:
            return self.host
        return _outside_host() if wildcard else self.host

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Reservation:
    """Reserves a port for a server that starts later, possibly in another process, possibly more than once.

    The reservation is a socket that is bound with SO_REUSEPORT but does not listen. The server can bind the same port
    if it sets that option too. Raises AddressInUseError if another process uses the port, and ConfigurationError if
    the host is not an address of this machine.
    """

    def __init__(self, address: Address) -> None:
        with _bound(address, socket.SO_REUSEADDR) as probe:
            # Without SO_REUSEPORT, because with it the bind would succeed beside another server.
            port = probe.getsockname()[1]
        self._socket = _bound(Address(address.host, port), socket.SO_REUSEPORT)
        self.address = Address(address.host, port)

    def release(self) -> None:
        self._socket.close()


def two_free_ports(address: Address) -> Address:
    """The address, whose port and the next one are free; for port 0 with such a port. They are not reserved. Raises
    AddressInUseError and ConfigurationError."""
    while True:
        first = Reservation(address)
        try:
            Reservation(Address(address.host, first.address.port + 1)).release()
        except AddressInUseError:
            if address.port:
                raise
        else:
            return first.address
        finally:
            first.release()


def _bound(address: Address, option: int) -> socket.socket:
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "this is not a valid host name"
        raise ConfigurationError(f"cannot listen on {address}: {reason}; choose another --listen") from error
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, option, 1)
        bound.bind(target)
    except OSError as error:
        bound.close()
        if error.errno == errno.EADDRNOTAVAIL:
            raise ConfigurationError(
                f"cannot listen on {address}: {address.host} is not an address of this machine; "
                "choose another --listen"
            ) from error
        raise address_error(address, error.strerror or str(error)) from error
    return bound


def network_of(host: str) -> str:
    """The network of a client, for limits per client: its IPv4 address, or the /64 network of its IPv6 address, because
    one host can have all addresses of that. Text that is no address is its own network."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else address
    if mapped is not None:
        return str(mapped)
    return str(ipaddress.ip_network((address, 64), strict=False))


def address_error(address: Address, reason: str) -> AddressInUseError:
    return AddressInUseError(
        f"cannot listen on {address}: {reason}; stop the process that uses it, or choose another --listen (port 0 "
        "selects a free port)"
    )


def _outside_host() -> str:
    """The local address that a packet to another network would have. Sends no packet."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as route:
        try:
            route.connect(("192.0.2.1", 9))
        except OSError:
            return "127.0.0.1"
        host: str = route.getsockname()[0]
        return host
