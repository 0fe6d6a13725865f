"""What repair copies, and how, between real storage nodes behind real servers."""

from collections.abc import Callable
from pathlib import Path

import grpc

from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_api.v1 import kvstore_pb2_grpc as rpc
from kvstore_cluster.durability import Durability
from kvstore_cluster.forgotten import Forgotten
from kvstore_cluster.put import PutOptions
from tests.sample_chunk import sample_chunk
from tests.service.repair_cluster import Cluster, samples, wait_for

KLT = "high-klt-zstd"


def test_a_chunk_of_another_calibration_is_left_alone(make_cluster: Callable[[int], Cluster]) -> None:
    cluster = make_cluster(2)
    a, b = cluster.add("a"), cluster.add("b")
    ours = [sample_chunk(n, encoding=KLT, calibration=b"1" * 32) for n in range(10)]
    theirs = [sample_chunk(n, encoding=KLT, calibration=b"2" * 32) for n in range(10)]
    for mine, other in zip(ours, theirs, strict=True):
        a.put(mine)
        b.put(other)
    # The same chunk in another encoding is a chunk of its own.
    exact = samples(10)
    for chunk in exact:
        a.put(chunk)
    for _ in range(3):
        before = cluster.coordinator.repair()
        cluster.tick()
        wait_for(
            lambda: all(cell.gauges["repair_round"] == before for cell in (a, b))  # noqa: B023
        )
    assert all(a.has(chunk) for chunk in ours)
    assert all(b.has(chunk) for chunk in (*theirs, *exact))
    assert (a.sent, b.sent) == (10, 0)


def test_copies_keep_what_was_said_of_the_original(make_cluster: Callable[[int], Cluster]) -> None:
    cluster = make_cluster(1)
    cluster.add("a")
    chunk = sample_chunk(3)
    start = pb.PutStart(
        chunk=pb.ChunkRef(content_id=chunk.chunk_id.content_id, prefix_id=chunk.chunk_id.prefix_id),
        encoding=chunk.encoding,
        size_bytes=len(chunk.data),
        ttl_s=1000,
        tenant="blue",
        cost=7.5,
    )
    steps = [pb.PutRequest(start=start), pb.PutRequest(data=chunk.data), pb.PutRequest(end=pb.PutEnd())]
    with grpc.insecure_channel(cluster.cells["a"].server.address) as channel:
        (reply,) = rpc.StorageStub(channel).Put(iter(steps))
    assert reply.status == pb.PUT_STATUS_STORED
    receiver = cluster.add("b")
    cluster.coordinator.drain("a")
    cluster.tick()
    wait_for(lambda: receiver.has(chunk))
    ((copy,), cursor) = receiver.node.list(0, 10)
    assert (copy.chunk_id, copy.encoding, cursor) == (chunk.chunk_id, chunk.encoding, 0)
    assert (copy.tenant, copy.cost) == ("blue", 7.5)
    assert 900 < copy.ttl_left_s <= 1000


def test_copies_of_what_is_on_disk_are_on_disk(
    make_cluster: Callable[[int], Cluster], tmp_path: Path
) -> None:
    cluster = make_cluster(2)
    cluster.add("a", disk=tmp_path / "a")
    chunks = samples(5)
    cluster.store(chunks)
    receiver = cluster.add("b", disk=tmp_path / "b", durability=Durability.MEMORY)
    cluster.settle()
    variants, _ = receiver.node.list(0, 10)
    assert [variant.on_disk for variant in variants] == [True] * len(chunks)


def test_a_node_without_disk_takes_copies_of_what_is_on_disk(
    make_cluster: Callable[[int], Cluster], tmp_path: Path
) -> None:
    cluster = make_cluster(2)
    cluster.add("a", disk=tmp_path / "a")
    chunks = samples(5)
    cluster.store(chunks)
    cluster.add("b")
    cluster.settle()
    assert cluster.whole(chunks)
    assert cluster.cells["a"].gauges["repair_left"] == 0


def test_a_node_that_refuses_copies_does_not_keep_repair_from_ending(
    make_cluster: Callable[[int], Cluster],
) -> None:
    cluster = make_cluster(2)
    sender = cluster.add("a")
    chunks = samples(5)
    cluster.store(chunks)
    cluster.add("b", durability=Durability.DURABLE)  # and no disk
    cluster.settle()
    assert sender.gauges["repair_left"] == len(chunks)


def test_a_node_that_has_not_heard_of_a_forgotten_tenant_copies_nothing_of_it(
    make_cluster: Callable[[int], Cluster],
) -> None:
    cluster = make_cluster(2)
    sender, receiver = cluster.add("a"), cluster.add("b")
    for number, chunk in enumerate(samples(8)):
        options = PutOptions(tenant=("red", "blue")[number % 2])
        put = sender.node.begin_put(chunk.chunk_id, chunk.encoding, len(chunk.data), options=options)
        assert put is not None
        put.write(chunk.data)
        assert put.commit()
    order = Forgotten({"red": 5})
    receiver.node.forget(order)
    cluster.settle()
    assert (set(sender.node.usage()), set(receiver.node.usage())) == ({"red", "blue"}, {"blue"})
    assert sender.worker.counters()["repair_failed"] == 0
    sender.node.forget(order)
    before = cluster.coordinator.repair()
    cluster.tick()
    wait_for(lambda: all(cell.gauges["repair_round"] == before for cell in (sender, receiver)))
    assert set(sender.node.usage()) == set(receiver.node.usage()) == {"blue"}
