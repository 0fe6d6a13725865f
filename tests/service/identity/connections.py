"""Every kind of connection to every port, with and without TLS: the second table of docs/security.md.

`python -m tests.service.identity.connections` prints it.
"""

import contextlib
import ssl
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_client.connector import Connector
from kvstore_client.settings import SecuritySettings
from kvstore_client.transport import BulkTransport, Connections, ReceiveMemory
from kvstore_codec.errors import TransferError
from kvstore_service.identity import Scope
from kvstore_service.listen import Address, Reservation
from kvstore_service.metrics_server import metrics_endpoint
from tests.authority import Authority, Pair
from tests.client.transport.conftest import steps
from tests.sample_chunk import sample_chunk
from tests.service.secured import HOST, SecuredCluster

PORTS = ("coordinator", "node", "bulk port", "metrics")
CHUNK = sample_chunk()


@dataclass(frozen=True)
class Files:
    authority: Authority
    server: Pair
    client: Pair
    expired: Pair
    foreign_authority: Authority
    foreign: Pair

    @classmethod
    def made_in(cls, folder: Path) -> "Files":
        authority, other = Authority(folder / "own"), Authority(folder / "other")
        return cls(
            authority,
            authority.sign("server"),
            authority.sign("client"),
            authority.sign("expired", days=-1),
            other,
            other.sign("foreign"),
        )

    def service(self, kind: str) -> dict[str, object]:
        """Settings of a service that speaks plain TCP, TLS, or TLS in both directions."""
        if kind == "plain":
            return {}
        pair = {"tls_cert": self.server.certificate, "tls_key": self.server.key}
        known = {"tls_ca": self.authority.certificate}
        return pair | known | ({"tls_client_ca": self.authority.certificate} if kind == "mTLS" else {})

    def presenting(self, pair: Pair) -> dict[str, object]:
        """Settings of a client that trusts the service and presents a certificate."""
        trusting = {"tls_ca": self.authority.certificate}
        return trusting | {"tls_cert": pair.certificate, "tls_key": pair.key}


CASES: dict[str, tuple[str, Callable[[Files], dict[str, object]]]] = {
    "plain TCP to plain TCP": ("plain", lambda _: {}),
    "TLS to plain TCP": ("plain", lambda files: {"tls_ca": files.authority.certificate}),
    "plain TCP to TLS": ("TLS", lambda _: {}),
    "TLS": ("TLS", lambda files: {"tls_ca": files.authority.certificate}),
    "TLS, the client trusts another authority": (
        "TLS",
        lambda files: {"tls_ca": files.foreign_authority.certificate},
    ),
    "TLS, the client expects another name": (
        "TLS",
        lambda files: {"tls_ca": files.authority.certificate, "tls_name": "other.example"},
    ),
    "mTLS": ("mTLS", lambda files: files.presenting(files.client)),
    "mTLS, the client has no certificate": ("mTLS", lambda files: {"tls_ca": files.authority.certificate}),
    "mTLS, the client's certificate has expired": ("mTLS", lambda files: files.presenting(files.expired)),
    "mTLS, the client's certificate is of another authority": (
        "mTLS",
        lambda files: files.presenting(files.foreign),
    ),
    "plain TCP to mTLS": ("mTLS", lambda _: {}),
}


def results(files: Files, folder: Path) -> dict[str, list[str]]:
    """By case: whether each of PORTS serves a client whose token is valid."""
    found: dict[str, list[str]] = {}
    for kind in ("plain", "TLS", "mTLS"):
        (folder / kind).mkdir()
        with _served(folder / kind, files.service(kind)) as (cluster, metrics_port, token):
            for case, (service, client) in CASES.items():
                if service == kind:
                    given = {"token": token} | client(files)
                    settings = SecuritySettings.model_validate(given)
                    found[case] = [
                        "yes" if served else "no" for served in _ports(cluster, metrics_port, settings)
                    ]
    return {case: found[case] for case in CASES}


def connections_table(found: dict[str, list[str]]) -> str:
    lines = [["connection", *PORTS], ["---"] * (1 + len(PORTS))]
    lines += [[case, *cells] for case, cells in found.items()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


@contextlib.contextmanager
def _served(folder: Path, settings: dict[str, object]) -> Iterator[tuple[SecuredCluster, int, str]]:
    """A cluster, the port of its metrics, and a token that every port accepts."""
    reservation = Reservation(Address(HOST, 0))
    reservation.release()
    cluster = SecuredCluster(folder, **settings)
    token = cluster.token(None, Scope.DATA, Scope.ADMIN)
    try:
        with metrics_endpoint(reservation.address, cluster.security):
            yield cluster, reservation.address.port, token
    finally:
        cluster.close()


def _ports(cluster: SecuredCluster, metrics_port: int, settings: SecuritySettings) -> Iterator[bool]:
    connector = Connector(settings)
    for address, call in (
        (cluster.front.address, "/kvstore.v1.Coordinator/Membership"),
        (cluster.storage.address, "/kvstore.v1.Storage/Lookup"),
    ):
        with connector.channel(address) as channel:
            try:
                channel.unary_unary(call)(b"", timeout=10)
            except grpc.RpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise
                yield False
            else:
                yield True
    yield _bulk(cluster, connector)
    yield _metrics(metrics_port, connector)


def _bulk(cluster: SecuredCluster, connector: Connector) -> bool:
    host, _, port = cluster.bulk.address.rpartition(":")
    name = connector.server_name(host)
    connections = Connections(host, int(port), connector.tls_context, name, token=connector.token)
    transport = BulkTransport(connections, ReceiveMemory())
    try:
        (reply,) = transport.put(steps(CHUNK), 10)
    except TransferError:
        return False
    finally:
        transport.close()
    return reply.status in (pb.PUT_STATUS_STORED, pb.PUT_STATUS_ALREADY_STORED)


def _metrics(port: int, connector: Connector) -> bool:
    context = connector.tls_context()
    url = f"{'http' if context is None else 'https'}://{connector.server_name(HOST)}:{port}/metrics"
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {connector.token()}"})  # noqa: S310
    options: dict[str, Any] = {} if context is None else {"context": context}
    try:
        with urllib.request.urlopen(request, timeout=10, **options) as response:  # noqa: S310
            return bool(response.status == 200)
    except (urllib.error.URLError, ssl.SSLError, ConnectionError):
        return False


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        files = Files.made_in(Path(folder) / "files")
        print(connections_table(results(files, Path(folder))), end="")


if __name__ == "__main__":
    main()
