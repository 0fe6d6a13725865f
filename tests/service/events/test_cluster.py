"""The whole cluster with real Ray: a router's index equals the cluster's through ten thousand puts and all losses."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from kvstore_api.placement import Member, Placement
from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_api.v1 import kvstore_pb2_grpc as rpc
from kvstore_client.kv_events import EventSubscriber
from kvstore_service.cluster_stats import cluster_stats
from kvstore_service.embedded import EmbeddedCluster
from kvstore_service.settings import settings_of
from tests.processes import descendants
from tests.sample_chunk import SampleChunk, sample_chunk
from tests.service.events.publishing import follow
from tests.service.test_embedded import members, ref, wait_until

CHUNKS = 5_000  # each on two nodes: ten thousand puts


def put_all(cluster: EmbeddedCluster, chunks: list[SampleChunk]) -> None:
    """Puts each chunk on its two owners."""
    live = list(members(cluster).values())
    by_node: dict[Member, list[SampleChunk]] = {}
    owners = Placement(live, 2).owners([chunk.chunk_id.content_id for chunk in chunks])
    for chunk, of in zip(chunks, owners, strict=True):
        for member in of:
            by_node.setdefault(member, []).append(chunk)
    for member, own in by_node.items():
        with grpc.insecure_channel(member.endpoint) as channel:
            replies = rpc.StorageStub(channel).Put(steps(own))
            assert {reply.status for reply in replies} <= {pb.PUT_STATUS_STORED, pb.PUT_STATUS_ALREADY_STORED}


def steps(chunks: list[SampleChunk]) -> Iterator[pb.PutRequest]:
    for chunk in chunks:
        start = pb.PutStart(chunk=ref(chunk), encoding=chunk.encoding, size_bytes=len(chunk.data))
        yield pb.PutRequest(start=start)
        yield pb.PutRequest(data=chunk.data)
        yield pb.PutRequest(end=pb.PutEnd())


def stored(cluster: EmbeddedCluster) -> dict[bytes, frozenset[str]]:
    """What the nodes have, by their own lists."""
    blocks: dict[bytes, frozenset[str]] = {}
    for member in members(cluster).values():
        with grpc.insecure_channel(member.endpoint) as channel:
            cursor, first = 0, True
            while cursor or first:
                first = False
                page = rpc.StorageStub(channel).List(pb.ListRequest(cursor=cursor))
                cursor = page.next_cursor
                for variant in page.variants:
                    tiers = {"CPU"} if variant.in_memory else set()
                    tiers |= {"STORAGE"} if variant.on_disk else set()
                    block = variant.chunk.prefix_id
                    blocks[block] = blocks.get(block, frozenset()) | tiers
    return blocks


@pytest.mark.slow
def test_a_routers_index_equals_the_clusters(tmp_path: Path) -> None:
    settings = settings_of(
        nodes=3, replicas=2, memory=24 << 20, disk=16 << 20, data_dir=tmp_path, events="127.0.0.1:0"
    )
    with EmbeddedCluster(settings) as cluster, EventSubscriber(cluster.address, silence_s=3.0) as router:
        for begin in range(0, CHUNKS, 1000):
            put_all(cluster, [sample_chunk(content=n, frame_bytes=150) for n in range(begin, begin + 1000)])
            router.poll(0)
        follow(router, lambda: stored(cluster), patience_s=30)
        counters = [node.stats.counters for node in cluster_stats(cluster.address).nodes]
        assert all(each["evictions"] and each["demotions"] for each in counters)
        assert len(router.blocks.tiers) > 1000
        lost = members(cluster)["node-0"]
        os.kill(cluster.storage_pids()["node-0"], signal.SIGKILL)
        wait_until(lambda: members(cluster).get("node-0") != lost, patience_s=20)
        follow(router, lambda: stored(cluster), patience_s=60)
        wait_until(lambda: "node-0" in members(cluster), patience_s=40)  # with what is on its disk
        follow(router, lambda: stored(cluster), patience_s=30)
        (coordinator,) = descendants("ray::Coordinat")
        coordinator.kill()
        wait_until(lambda: not coordinator.is_running(), patience_s=20)
        follow(router, lambda: stored(cluster) if coordinator_answers(cluster) else {}, patience_s=60)
        assert cluster_stats(cluster.address).events["dropped"] == 0
    with EmbeddedCluster(settings) as again, EventSubscriber(again.address) as router:
        follow(router, lambda: stored(again), patience_s=30)
        assert len(router.blocks.tiers) > 1000


def coordinator_answers(cluster: EmbeddedCluster) -> bool:
    try:
        return len(members(cluster)) == 3
    except grpc.RpcError:
        return False
