"""TLS on every port, certificates as identities, and certificates that are replaced while the service runs."""

import dataclasses
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from prometheus_client import Gauge

from kvstore_api.placement import Member
from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_client.connector import Connector
from kvstore_client.settings import SecuritySettings
from kvstore_client.transport import BulkTransport, Connections, ReceiveMemory
from kvstore_codec.errors import ConfigurationError, ServiceError, TransferError
from kvstore_service.cluster_stats import cluster_stats
from kvstore_service.embedded import EmbeddedCluster
from kvstore_service.grpc_coordinator import StorageProbe
from kvstore_service.identity import Credential, Scope, new_token
from kvstore_service.identity.credential import new_id
from kvstore_service.identity.file import changing
from kvstore_service.listen import Address
from kvstore_service.metrics_server import metrics_endpoint
from kvstore_service.peer_nodes import GrpcPeers
from kvstore_service.security import Security
from kvstore_service.settings import settings_of
from kvstore_service.tls import ServerTls, TlsFiles
from tests.authority import Authority, Pair
from tests.client.transport.conftest import steps
from tests.clock import Clock
from tests.sample_chunk import sample_chunk
from tests.service.secured import HOST, SecuredCluster, code_of, code_of_stream

CHUNK = sample_chunk()
LOOKUP = pb.LookupRequest()
UNAVAILABLE, UNAUTHENTICATED = grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNAUTHENTICATED
Make = Callable[..., SecuredCluster]


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def server(authority: Authority) -> Pair:
    return authority.sign("server")


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    made: list[SecuredCluster] = []

    def start(pair: Pair, **settings: object) -> SecuredCluster:
        cluster = SecuredCluster(tmp_path, tls_cert=pair.certificate, tls_key=pair.key, **settings)
        made.append(cluster)
        return cluster

    yield start
    for cluster in made:
        cluster.close()


def looked_up(cluster: SecuredCluster, token: str = "", **settings: object) -> grpc.StatusCode:
    return code_of(cluster.nodes(token, **settings).Lookup.future(LOOKUP, timeout=5))


def stored(cluster: SecuredCluster, token: str, **settings: object) -> list[int]:
    """How the bulk port answers a put."""
    given = SecuritySettings.model_validate({"token": token} | settings)
    connector = Connector(given)
    host, _, port = cluster.bulk.address.rpartition(":")
    name = connector.server_name(host)
    connections = Connections(host, int(port), connector.tls_context, name, token=connector.token)
    transport = BulkTransport(connections, ReceiveMemory())
    try:
        return [reply.status for reply in transport.put(steps(CHUNK), 5)]
    finally:
        transport.close()


def test_every_port_speaks_tls(make: Make, authority: Authority, server: Pair) -> None:
    cluster = make(server, tls_ca=authority.certificate)
    token, known = cluster.token("a"), {"tls_ca": authority.certificate}
    assert looked_up(cluster, token, **known) is grpc.StatusCode.OK
    assert cluster.coordinators(token, **known).Membership(pb.MembershipRequest()).members
    assert stored(cluster, token, **known) == [pb.PUT_STATUS_STORED]
    # What is right about a caller does not help on a port that speaks otherwise.
    assert looked_up(cluster, token) is UNAVAILABLE
    with pytest.raises(TransferError):
        stored(cluster, token)


def test_a_server_of_another_authority_is_not_trusted(make: Make, server: Pair, tmp_path: Path) -> None:
    cluster = make(server)
    token, stranger = cluster.token("a"), {"tls_ca": Authority(tmp_path / "other").certificate}
    assert looked_up(cluster, token, **stranger) is UNAVAILABLE
    with pytest.raises(TransferError) as failure:
        stored(cluster, token, **stranger)
    assert failure.value.reason == "tls"


@pytest.mark.parametrize("case", ["without TLS", "another authority"])
def test_a_command_without_the_right_tls_says_so(
    make: Make, server: Pair, case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = make(server)
    monkeypatch.setenv("KVSTORE_TOKEN", cluster.token(None, Scope.ADMIN))
    if case == "another authority":
        monkeypatch.setenv("KVSTORE_TLS_CA", str(Authority(tmp_path / "other").certificate))
    with pytest.raises(ServiceError, match="KVSTORE_TLS_CA"):
        cluster_stats(cluster.front.address)


def test_the_name_of_a_server_may_be_given(make: Make, authority: Authority) -> None:
    """As for pods, whose addresses no certificate can list."""
    pair = authority.sign("pods", alternative="DNS:kvstore.example")
    cluster = make(pair, tls_ca=authority.certificate, tls_name="kvstore.example")
    token, known = cluster.token("a"), {"tls_ca": authority.certificate}
    assert looked_up(cluster, token, **known) is UNAVAILABLE
    assert looked_up(cluster, token, **known, tls_name="kvstore.example") is grpc.StatusCode.OK
    assert stored(cluster, token, **known, tls_name="kvstore.example") == [pb.PUT_STATUS_STORED]
    assert probed(cluster.security, cluster) is None


def test_clients_must_present_a_certificate_if_the_service_asks(
    make: Make, authority: Authority, server: Pair, tmp_path: Path
) -> None:
    cluster = make(server, tls_ca=authority.certificate, tls_client_ca=authority.certificate)
    token, known = cluster.token("a"), {"tls_ca": authority.certificate}
    good = authority.sign("client")
    expired = authority.sign("expired", days=-1)
    foreign = Authority(tmp_path / "other").sign("foreign")

    def presenting(pair: Pair) -> dict[str, object]:
        return known | {"tls_cert": pair.certificate, "tls_key": pair.key}

    assert looked_up(cluster, token, **presenting(good)) is grpc.StatusCode.OK
    assert stored(cluster, token, **presenting(good)) == [pb.PUT_STATUS_STORED]
    for refused in (known, presenting(expired), presenting(foreign)):
        assert looked_up(cluster, token, **refused) is UNAVAILABLE
        with pytest.raises(TransferError):
            stored(cluster, token, **refused)
    # A certificate of the right authority is no credential by itself.
    assert looked_up(cluster, **presenting(good)) is UNAUTHENTICATED
    with pytest.raises(TransferError, match="no credential names the subject"):
        stored(cluster, "", **presenting(good))


@pytest.mark.parametrize("subject", ["worker.acme", "spiffe://acme/worker"])
def test_a_certificate_may_be_the_credential(
    make: Make, authority: Authority, server: Pair, subject: str
) -> None:
    cluster = make(server, tls_ca=authority.certificate, tls_client_ca=authority.certificate)
    with changing(cluster.file) as known:
        known.append(Credential(new_id(), "worker", "acme", frozenset({Scope.DATA}), subject=subject))
    cluster.refresh()
    pair = authority.sign("worker.acme", alternative="URI:spiffe://acme/worker", file="worker")
    presenting = {"tls_ca": authority.certificate, "tls_cert": pair.certificate, "tls_key": pair.key}
    assert looked_up(cluster, **presenting) is grpc.StatusCode.OK
    assert stored(cluster, "", **presenting) == [pb.PUT_STATUS_STORED]
    assert [variant.tenant for variant in cluster.node.list()[0]] == ["acme"]
    drain = cluster.coordinators(**presenting).Drain.future(pb.DrainRequest(node_id="node-0"))
    assert code_of(drain) is grpc.StatusCode.PERMISSION_DENIED
    with changing(cluster.file) as known:
        known.clear()
    cluster.refresh()
    assert looked_up(cluster, **presenting) is UNAUTHENTICATED


def test_without_certificates_of_clients_a_stranger_sends_no_request(
    make: Make, authority: Authority, server: Pair
) -> None:
    """Also when a credential names a certificate: no port asks for one, so it identifies nobody."""
    cluster = make(server, tls_ca=authority.certificate)
    with changing(cluster.file) as known:
        known.append(Credential(new_id(), "worker", "acme", frozenset({Scope.DATA}), subject="worker.acme"))
    cluster.refresh()
    unsent = threading.Event()

    def steps() -> Iterator[pb.PutRequest]:
        unsent.wait(30)
        yield from ()

    call = cluster.nodes(tls_ca=authority.certificate).Put(steps())
    assert code_of_stream(call) is UNAUTHENTICATED
    unsent.set()
    assert not cluster.access.knows_certificates


def test_without_an_authority_only_the_certificate_itself_is_trusted(
    make: Make, authority: Authority, tmp_path: Path
) -> None:
    """Not the certificates behind it in its file, whose authorities sign for others, too."""
    pair, other = authority.sign("chain"), authority.sign("other")
    pair.certificate.write_bytes(pair.certificate.read_bytes() + authority.certificate.read_bytes())
    chained = {"tls_cert": pair.certificate, "tls_key": pair.key}
    own = make(pair)
    token = own.token("a")
    assert looked_up(own, token, **chained) is grpc.StatusCode.OK
    assert stored(own, token, **chained) == [pb.PUT_STATUS_STORED]
    (tmp_path / "other").mkdir()
    foreign = SecuredCluster(tmp_path / "other", tls_cert=other.certificate, tls_key=other.key)
    try:
        token = foreign.token("a")
        assert looked_up(foreign, token, **chained) is UNAVAILABLE
        with pytest.raises(TransferError):
            stored(foreign, token, **chained)
    finally:
        foreign.close()


def probed(security: Security, cluster: SecuredCluster) -> str | None:
    """Why the coordinator's probe of the node fails, if it does."""
    probe = StorageProbe(security.connector())
    (failure,) = probe.failures([Member("node-0", cluster.storage.address)])
    probe.close()
    return failure


@pytest.mark.parametrize("both_ways", [False, True], ids=["TLS", "mTLS"])
def test_the_processes_of_a_cluster_know_one_another(
    make: Make, authority: Authority, server: Pair, both_ways: bool
) -> None:
    asked = {"tls_ca": authority.certificate, "tls_client_ca": authority.certificate} if both_ways else {}
    cluster = make(server, **asked)
    assert probed(cluster.security, cluster) is None
    peers = GrpcPeers(cluster.node, cluster.security)
    assert peers.room_bytes(Member("node-0", cluster.storage.address)) > 0
    peers.close()


def test_certificates_are_replaced_while_the_service_runs(
    make: Make, authority: Authority, tmp_path: Path
) -> None:
    """Also the authority. Calls on open connections go on, and new connections see the new certificate."""
    pair = authority.sign("replaced")
    cluster = make(pair)
    token = cluster.token("a")
    clock = Clock()
    trusted = tmp_path / "trusted.pem"
    trusted.write_bytes(authority.certificate.read_bytes())
    connector = Connector(SecuritySettings(tls_ca=trusted, token=token), clock)  # type: ignore[arg-type]
    with connector.channel(cluster.storage.address) as open_channel:
        lookup = open_channel.unary_unary("/kvstore.v1.Storage/Lookup")
        lookup(b"", timeout=5)
        successor = Authority(tmp_path / "successor")
        new = successor.sign("replaced")
        pair.key.write_bytes(new.key.read_bytes())
        assert looked_up(cluster, token, tls_ca=authority.certificate) is grpc.StatusCode.OK  # no pair yet
        pair.certificate.write_bytes(new.certificate.read_bytes())
        lookup(b"", timeout=5)
        assert looked_up(cluster, token, tls_ca=authority.certificate) is UNAVAILABLE
        assert looked_up(cluster, token, tls_ca=successor.certificate) is grpc.StatusCode.OK
        assert stored(cluster, token, tls_ca=successor.certificate) == [pb.PUT_STATUS_STORED]
        before = connector.changes
        trusted.write_bytes(successor.certificate.read_bytes())
        clock.now_s += 10
        assert connector.changes == before + 1
        with connector.channel(cluster.storage.address) as channel:
            channel.unary_unary("/kvstore.v1.Storage/Lookup")(b"", timeout=5)


def test_a_certificate_without_its_key_does_not_take_effect(
    authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    pair = authority.sign("unpaired")
    tls = ServerTls(TlsFiles(pair.certificate, pair.key))
    before = tls.context()
    pair.certificate.write_bytes(authority.sign("another").certificate.read_bytes())
    assert tls.context() is before
    assert tls.context() is before
    assert caplog.text.count("stay in effect") == 1
    pair.key.write_bytes((pair.key.parent / "another.key").read_bytes())
    assert tls.context() is not before


@pytest.mark.parametrize("wrong", ["certificate", "key", "client_ca"])
def test_files_that_are_no_certificates_are_named(tmp_path: Path, server: Pair, wrong: str) -> None:
    bad = tmp_path / "bad.pem"
    bad.write_text("no certificate")
    files = {"certificate": server.certificate, "key": server.key} | {wrong: bad}
    with pytest.raises(ConfigurationError, match=r"cannot use TLS.*bad\.pem"):
        ServerTls(TlsFiles(**files))


def fetched(port: int, token: str = "", context: ssl.SSLContext | None = None) -> tuple[int, str]:
    scheme = "http" if context is None else "https"
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(f"{scheme}://{HOST}:{port}/metrics", headers=headers)  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=5, context=context) as response:  # noqa: S310
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_metrics_are_for_operators(make: Make, authority: Authority, server: Pair, unused_port: int) -> None:
    cluster = make(server)
    context = ssl.create_default_context(cafile=authority.certificate)
    operator, reader = cluster.token(None, Scope.ADMIN), cluster.token(None, Scope.METRICS)
    others = [cluster.token("a"), cluster.token("a", Scope.ADMIN), cluster.token(None, Scope.NODE)]
    with metrics_endpoint(Address(HOST, unused_port), cluster.security) as registry:
        Gauge("kvstore_any", "any", registry=registry).set(3)
        status, text = fetched(unused_port, operator, context)
        assert (status, "kvstore_any 3.0" in text) == (200, True)
        assert fetched(unused_port, reader, context)[0] == 200
        assert fetched(unused_port, "", context)[0] == 401
        assert fetched(unused_port, "kvs_wrong", context)[0] == 401
        for token in others:
            status, text = fetched(unused_port, token, context)
            assert (status, "a credential" in text) == (403, True)
        with pytest.raises((urllib.error.URLError, ConnectionError)):
            fetched(unused_port, operator)


def test_a_node_of_another_cluster_is_refused(make: Make, server: Pair) -> None:
    """Even if it has the same certificate and the same credentials."""
    cluster = make(server)
    other = dataclasses.replace(cluster.security, node_token=new_token()[1])
    assert "UNAUTHENTICATED" in (probed(other, cluster) or "")


def test_a_cluster_outlives_files_that_do_not_fit_for_a_while(authority: Authority, tmp_path: Path) -> None:
    pair = authority.sign("cluster", file="outlives")
    cluster = EmbeddedCluster(settings_of(tls_cert=pair.certificate, tls_key=pair.key, memory="1MiB"))
    cluster.address = "127.0.0.1:1"
    pair.key.write_bytes(authority.sign("another").key.read_bytes())
    with pytest.raises(ServiceError):  # as from a coordinator that is away, which `serve` waits for
        cluster.stats()
