"""The service that is flooded, and connections to it."""

import contextlib
import socket
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import SecretStr

from kvstore_api.frames import PREFACE, FrameKind, pack_header
from kvstore_client.connector import Connector
from kvstore_client.settings import SecuritySettings

SOURCE = "127.0.0.2"
"""Address of the attackers; the honest client has another one, as it has on a network."""
HTTP2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""How an HTTP/2 connection begins: the preface, and empty settings."""


@dataclass(frozen=True)
class Target:
    """A running service. `ports` are host:port by what listens there."""

    ports: dict[str, str]
    ca: Path
    credentials: Path
    tokens: dict[str, str]
    """Of the callers `honest`, `rival`, `everyone` (of all tenants) and `prometheus`."""

    def connector(self, caller: str = "") -> Connector:
        return Connector(SecuritySettings(token=SecretStr(self.tokens.get(caller, "")), tls_ca=self.ca))

    def context(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=self.ca)


@contextlib.contextmanager
def tls_connection(target: Target, port: str, source: str = SOURCE) -> Iterator[ssl.SSLSocket]:
    """A connection to a port after its TLS handshake. Raises OSError."""
    context = target.context()
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection(address_of(target.ports[port]), 5, source_address=(source, 0)) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as connected,
    ):
        yield connected


@contextlib.contextmanager
def bulk_connection(target: Target, caller: str) -> Iterator[ssl.SSLSocket]:
    with tls_connection(target, "bulk") as connected:
        connected.sendall(PREFACE)
        if token := target.tokens.get(caller, "").encode():
            connected.sendall(pack_header(FrameKind.TOKEN, len(token)) + token)
        yield connected


def address_of(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    return host, int(port)
