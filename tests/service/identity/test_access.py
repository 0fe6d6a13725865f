"""Who may call a service with credentials, over gRPC."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvstore_api.placement import Member
from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_cluster.arena import Arena
from kvstore_cluster.node import StorageNode
from kvstore_cluster.put import PutOptions
from kvstore_service import grpc_server
from kvstore_service.grpc_coordinator import StorageProbe
from kvstore_service.grpc_storage import serve_storage
from kvstore_service.identity import Scope
from kvstore_service.peer_nodes import GrpcPeers
from kvstore_service.security import Security
from tests.sample_chunk import sample_chunk
from tests.service.secured import HOST, SecuredCluster, code_of, code_of_stream, put_steps, ref

CHUNK = sample_chunk()
NOTHING = pb.LookupRequest(chunks=[ref(CHUNK)], encodings=[CHUNK.encoding])


def test_a_call_without_a_credential_is_told_what_to_do(cluster: SecuredCluster) -> None:
    with pytest.raises(grpc.RpcError) as refusal:
        cluster.nodes().Lookup(NOTHING)
    assert refusal.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert "KVSTORE_TOKEN_FILE" in refusal.value.details()
    assert code_of(cluster.coordinators().Membership.future(pb.MembershipRequest())) is (
        grpc.StatusCode.UNAUTHENTICATED
    )


def test_the_health_of_a_server_is_no_secret(cluster: SecuredCluster) -> None:
    for address in (cluster.storage.address, cluster.front.address):
        health = health_pb2_grpc.HealthStub(cluster.channel(address))
        assert health.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.SERVING


def test_a_refused_call_receives_nothing_of_its_request(cluster: SecuredCluster) -> None:
    """A stranger's messages take no memory: the answer comes although none of them was sent."""
    endless = threading.Event()

    def steps():
        endless.wait(30)
        yield from ()

    call = cluster.nodes().Put(steps())
    assert code_of_stream(call) is grpc.StatusCode.UNAUTHENTICATED
    endless.set()


def test_a_revoked_or_expired_token_ends(cluster: SecuredCluster) -> None:
    stub = cluster.nodes(token := cluster.token("a"))
    assert stub.Lookup(NOTHING).answers
    cluster.revoke(token)
    assert code_of(stub.Lookup.future(NOTHING)) is grpc.StatusCode.UNAUTHENTICATED
    with pytest.raises(grpc.RpcError) as refusal:
        cluster.nodes(cluster.token("a", lifetime_s=-1)).Lookup(NOTHING)
    assert "has expired" in refusal.value.details()


def test_a_tenant_may_not_name_another_one(cluster: SecuredCluster) -> None:
    stub = cluster.nodes(cluster.token("a"))
    assert [reply.status for reply in stub.Put(iter(put_steps(CHUNK, "a")))] == [pb.PUT_STATUS_STORED]
    for stream in (stub.Put(iter(put_steps(CHUNK, "b"))), stub.Read(pb.ReadRequest(tenant="b"))):
        assert code_of_stream(stream) is grpc.StatusCode.PERMISSION_DENIED
    for call in (
        stub.Lookup.future(pb.LookupRequest(tenant="b")),
        stub.Delete.future(pb.DeleteRequest(tenant="b")),
        stub.Report.future(pb.ReportRequest(tenant="b")),
        stub.List.future(pb.ListRequest(tenant="b")),
    ):
        assert code_of(call) is grpc.StatusCode.PERMISSION_DENIED


def test_a_caller_of_every_tenant_names_the_one_it_acts_for(cluster: SecuredCluster) -> None:
    stub = cluster.nodes(cluster.token(None, Scope.DATA, Scope.ADMIN))
    for tenant in ("", "a", "b"):
        (reply,) = stub.Put(iter(put_steps(CHUNK, tenant)))
        assert reply.status == pb.PUT_STATUS_STORED
    assert {one.tenant for one in stub.List(pb.ListRequest()).variants} == {"", "a", "b"}
    assert {one.tenant for one in stub.List(pb.ListRequest(tenant="a")).variants} == {"a"}
    assert stub.Delete(pb.DeleteRequest(chunks=[ref(CHUNK)], tenant="b")).deleted == 1
    (last,) = list(stub.Verify(pb.VerifyRequest(tenant="a")))[-1:]
    assert (last.done, last.checked) == (True, 1)


def test_an_operator_of_one_tenant_sees_its_own(cluster: SecuredCluster) -> None:
    everywhere = cluster.token(None, Scope.DATA, Scope.ADMIN)
    for tenant in ("a", "b"):
        list(cluster.nodes(everywhere).Put(iter(put_steps(CHUNK, tenant))))
        cluster.coordinators(everywhere).SetQuota(
            pb.SetQuotaRequest(quota=pb.Quota(tenant=tenant, limit_bytes=1 << 20))
        )
    token = cluster.token("a", Scope.ADMIN)
    node, coordinator = cluster.nodes(token), cluster.coordinators(token)
    assert [one.tenant for one in node.List(pb.ListRequest()).variants] == ["a"]
    assert list(node.Verify(pb.VerifyRequest()))[-1].checked == 1
    assert [quota.tenant for quota in coordinator.ListQuotas(pb.ListQuotasRequest()).quotas] == ["a"]
    assert coordinator.Pin(pb.PinRequest(chunks=[ref(CHUNK)])).pins == 1
    assert not cluster.coordinators(everywhere).ListPins(pb.ListPinsRequest(tenant="b")).chunks
    assert len(cluster.coordinator.pins("a")) == 1
    for call in (
        node.Stats.future(pb.StatsRequest()),
        coordinator.ClusterStats.future(pb.ClusterStatsRequest()),
        coordinator.SetQuota.future(pb.SetQuotaRequest(quota=pb.Quota(tenant="a", limit_bytes=0))),
        coordinator.Drain.future(pb.DrainRequest(node_id="node-0")),
    ):
        assert code_of(call) is grpc.StatusCode.PERMISSION_DENIED


def test_a_listing_tells_a_tenant_nothing_of_how_much_others_store(cluster: SecuredCluster) -> None:
    """Its cursors counted the chunks of all tenants."""
    ours, theirs = cluster.nodes(cluster.token("a")), cluster.nodes(cluster.token("b"))
    for number in range(20):
        (reply,) = theirs.Put(iter(put_steps(sample_chunk(number))))
        assert reply.status == pb.PUT_STATUS_STORED
    for number in range(3):
        list(ours.Put(iter(put_steps(sample_chunk(number)))))
    cursors, found = [0], []
    while not found or cursors[-1]:
        page = ours.List(pb.ListRequest(cursor=cursors[-1], limit=1))
        found += page.variants
        cursors.append(page.next_cursor)
    assert {variant.tenant for variant in found} == {"a"}
    assert len(found) == 3
    assert min(cursors[1:-1]) > 1 << 32
    invalid = theirs.List.future(pb.ListRequest(cursor=cursors[1], limit=1))
    assert code_of(invalid) is grpc.StatusCode.INVALID_ARGUMENT


def test_one_tenant_leaves_streams_for_others(
    cluster: SecuredCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grpc_server, "MAX_STREAMS_OF_TENANT", 2)
    greedy, ended = cluster.nodes(cluster.token("greedy")), threading.Event()

    def endless() -> Iterator[pb.PutRequest]:
        yield from put_steps(sample_chunk(5))[:1]
        ended.wait(60)

    held = [greedy.Put(endless()) for _ in range(2)]
    deadline_s = time.monotonic() + 30
    while code_of_stream(greedy.Put(iter(()))) is not grpc.StatusCode.RESOURCE_EXHAUSTED:
        assert time.monotonic() < deadline_s
    assert not any(call.done() for call in held)
    (reply,) = cluster.nodes(cluster.token("b")).Put(iter(put_steps(CHUNK)))
    assert reply.status == pb.PUT_STATUS_STORED
    ended.set()
    for call in held:
        call.cancel()


def test_a_stranger_cannot_watch_the_health_of_a_server(cluster: SecuredCluster) -> None:
    """A watch has no end, and nothing else would limit how many there are."""
    watch = health_pb2_grpc.HealthStub(cluster.channel(cluster.storage.address)).Watch(
        health_pb2.HealthCheckRequest(), timeout=10
    )
    assert code_of_stream(watch) is grpc.StatusCode.UNAUTHENTICATED


def test_a_call_that_no_rule_names_is_not_served(cluster: SecuredCluster) -> None:
    call = cluster.channel(cluster.storage.address, cluster.token(None, *Scope)).unary_unary(
        "/kvstore.v1.Storage/Unheard"
    )
    assert code_of(call.future(b"")) is grpc.StatusCode.UNIMPLEMENTED


def test_the_coordinator_probes_nodes_with_the_clusters_own_token(cluster: SecuredCluster) -> None:
    member = Member("node-0", cluster.storage.address)
    probe = StorageProbe(cluster.security.connector())
    assert probe.failures([member]) == [None]
    probe.close()
    stranger = StorageProbe(Security().connector())
    (failure,) = stranger.failures([member])
    assert failure is not None
    assert "UNAUTHENTICATED" in failure
    stranger.close()


def test_nodes_copy_the_chunks_of_each_tenant(cluster: SecuredCluster, tmp_path: Path) -> None:
    """Also those that have the same name."""
    other = StorageNode("node-1", Arena(16 << 20, 4 << 10), isolated=True)
    server = serve_storage(other, host=HOST, access=cluster.access)
    peers = GrpcPeers(cluster.node, cluster.security)
    try:
        theirs = sample_chunk(frame_bytes=1200)
        for tenant, chunk in (("a", CHUNK), ("b", theirs)):
            pending = cluster.node.begin_put(
                chunk.chunk_id, chunk.encoding, len(chunk.data), options=PutOptions(tenant=tenant)
            )
            assert pending is not None
            pending.write(chunk.data)
            pending.commit()
        member = Member("node-1", server.address)
        variants, _ = cluster.node.list()
        assert peers.lookup(member, variants) == [False, False]
        peers.push(member, variants[:1])
        assert peers.lookup(member, variants) == [True, False]
        peers.push(member, variants)
        assert peers.lookup(member, variants) == [True, True]
        for tenant, chunk in (("a", CHUNK), ("b", theirs)):
            with other.open(chunk.chunk_id, chunk.encoding, tenant=tenant) as reader:
                assert b"".join(v for views in reader.pieces(0, 0, 1 << 20) for v in views) == chunk.data
        assert peers.room_bytes(member) > 0
    finally:
        peers.close()
        server.stop(0)
    other.check_integrity()


def test_an_open_stream_of_puts_ends_with_its_credential(cluster: SecuredCluster) -> None:
    token, revoked = cluster.token("acme"), threading.Event()

    def steps() -> Iterator[pb.PutRequest]:
        yield from put_steps(sample_chunk(1))
        assert revoked.wait(30)
        yield from put_steps(sample_chunk(2))

    call = cluster.nodes(token).Put(steps(), timeout=60)
    assert next(call).status == pb.PUT_STATUS_STORED
    cluster.revoke(token)
    revoked.set()
    assert code_of_stream(call) == grpc.StatusCode.UNAUTHENTICATED
