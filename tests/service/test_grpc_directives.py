"""Pins, quotas, draining and repair, asked for over the wire."""

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from kvstore_api.placement import Member
from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_api.v1 import kvstore_pb2_grpc as rpc
from kvstore_cluster.calibrations import CalibrationRegistry
from kvstore_cluster.canaries import CanaryRegistry
from kvstore_cluster.catalogue import FileCatalogue
from kvstore_cluster.coordinator import Coordinator
from kvstore_service.grpc_coordinator import serve_coordinator
from kvstore_service.listen import Address
from tests.sample_chunk import sample_chunk

CHUNKS = [
    pb.ChunkRef(content_id=chunk.chunk_id.content_id, prefix_id=chunk.chunk_id.prefix_id)
    for chunk in sorted((sample_chunk(n) for n in range(3)), key=lambda chunk: chunk.chunk_id.content_id)
]
NODE = Member("node-0", "127.0.0.1:1", 2.0, "127.0.0.1:2", "rack-1")


@pytest.fixture
def coordinator(tmp_path: Path) -> Iterator[Coordinator]:
    catalogue = FileCatalogue(tmp_path)
    yield Coordinator(catalogue, replicas=3)
    catalogue.close()


@pytest.fixture
def stub(coordinator: Coordinator, tmp_path: Path) -> Iterator[rpc.CoordinatorStub]:
    registry = CalibrationRegistry(tmp_path / "calibrations")
    canaries = CanaryRegistry(tmp_path / "canaries")
    server = serve_coordinator(coordinator, registry, canaries, address=Address("127.0.0.1", 0))
    with grpc.insecure_channel(server.address) as channel:
        yield rpc.CoordinatorStub(channel)
    server.stop(0)


def test_the_membership_says_all_about_a_node(stub: rpc.CoordinatorStub, coordinator: Coordinator) -> None:
    coordinator.join(NODE, 1)
    stub.Drain(pb.DrainRequest(node_id="node-0"))
    reply = stub.Membership(pb.MembershipRequest())
    assert reply.replicas == 3
    assert list(reply.members) == [
        pb.Member(
            node_id="node-0",
            endpoint="127.0.0.1:1",
            weight=2.0,
            bulk_endpoint="127.0.0.1:2",
            domain="rack-1",
            draining=True,
        )
    ]
    assert stub.ClusterStats(pb.ClusterStatsRequest()).nodes[0].member.draining
    stub.Drain(pb.DrainRequest(node_id="node-0", cancel=True))
    assert not stub.Membership(pb.MembershipRequest()).members[0].draining


def test_pins(stub: rpc.CoordinatorStub, coordinator: Coordinator) -> None:
    assert stub.Pin(pb.PinRequest(chunks=CHUNKS)).pins == 3
    assert list(stub.ListPins(pb.ListPinsRequest()).chunks) == CHUNKS
    assert stub.Pin(pb.PinRequest(chunks=CHUNKS[:1], unpin=True)).pins == 2
    assert list(stub.ListPins(pb.ListPinsRequest()).chunks) == CHUNKS[1:]
    assert {chunk.content_id for chunk in coordinator.pins()} == {ref.content_id for ref in CHUNKS[1:]}


def test_quotas(stub: rpc.CoordinatorStub) -> None:
    for tenant, limit_bytes in (("green", 1 << 60), ("blue", 5), ("green", 7), ("red", 1), ("red", 0)):
        stub.SetQuota(pb.SetQuotaRequest(quota=pb.Quota(tenant=tenant, limit_bytes=limit_bytes)))
    assert list(stub.ListQuotas(pb.ListQuotasRequest()).quotas) == [
        pb.Quota(tenant="blue", limit_bytes=5),
        pb.Quota(tenant="green", limit_bytes=7),
    ]


def test_repair_counts_its_rounds(stub: rpc.CoordinatorStub) -> None:
    assert [stub.Repair(pb.RepairRequest()).round for _ in range(2)] == [1, 2]


def test_refusals_say_why(stub: rpc.CoordinatorStub, coordinator: Coordinator, tmp_path: Path) -> None:
    coordinator.join(NODE, 1)
    (tmp_path / "catalogue.tmp").mkdir()
    for call, request, code, reason in (
        (stub.Drain, pb.DrainRequest(node_id="z"), "NOT_FOUND", "known are node-0"),
        (stub.Drain, pb.DrainRequest(node_id="node-0", cancel=True), "NOT_FOUND", "not draining"),
        (stub.Drain, pb.DrainRequest(node_id="node-0"), "UNAVAILABLE", "cannot be written"),
        (stub.Pin, pb.PinRequest(chunks=CHUNKS), "UNAVAILABLE", "cannot be written"),
        (stub.Pin, pb.PinRequest(chunks=[pb.ChunkRef(content_id=b"x")]), "INVALID_ARGUMENT", "32 bytes each"),
        (stub.Repair, pb.RepairRequest(), "UNAVAILABLE", "cannot be written"),
    ):
        with pytest.raises(grpc.RpcError, match=reason) as refused:
            call(request)
        assert refused.value.code().name == code
