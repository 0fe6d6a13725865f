"""A router's index equals what the cluster stores, whatever happens to the cluster."""

import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
import zmq

from kvstore_api.kv_events import (
    END,
    Cleared,
    Event,
    Stored,
    decode_batch,
    decode_sequence,
    encode_sequence,
    topic_of,
)
from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_api.v1 import kvstore_pb2_grpc as rpc
from kvstore_client.kv_events import EventSubscriber
from kvstore_cluster.node import StorageNode
from kvstore_codec.errors import AddressInUseError, NodeUnavailableError
from kvstore_service.cluster_stats import cluster_stats
from kvstore_service.events.publisher import EventPublisher
from tests.cluster.disk_node import chunk_of, put
from tests.sample_chunk import sample_chunk
from tests.service.events.publishing import PublishingCluster, follow, publishing

CHUNKS = [sample_chunk(content=number, frame_bytes=900) for number in range(200)]  # 6 KB each


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[PublishingCluster]:
    with publishing(tmp_path) as made:
        yield made


def fill(node: StorageNode, numbers: range, **options: object) -> None:
    for number in numbers:
        put(node, CHUNKS[number], **options)


def test_it_knows_what_is_stored_before_and_after_it_came(cluster: PublishingCluster) -> None:
    one, two = cluster.start_node("one"), cluster.start_node("two")
    fill(one, range(10))
    with EventSubscriber(cluster.address) as router:
        follow(router, cluster.stored)
        fill(two, range(5, 20))
        follow(router, cluster.stored)
        assert len(router.blocks.tiers) == 20
        one.delete([chunk.chunk_id for chunk in CHUNKS[:10]])
        follow(router, cluster.stored)
        assert len(router.blocks.tiers) == 15
        assert router.snapshots == 1
    stats = cluster_stats(cluster.address).events
    assert (stats["blocks"], stats["nodes"], stats["dropped"]) == (15, 2, 0)


def test_each_tenant_hears_of_its_own_blocks(cluster: PublishingCluster) -> None:
    node = cluster.start_node("one")
    with (
        EventSubscriber(cluster.address, tenant="a") as a,
        EventSubscriber(cluster.address, tenant="ab") as ab,
    ):
        fill(node, range(5), tenant="a")
        fill(node, range(5, 12), tenant="ab")
        for router, tenant, count in ((a, "a", 5), (ab, "ab", 7)):
            follow(router, lambda tenant=tenant: cluster.stored(tenant))
            assert len(router.blocks.tiers) == count


@pytest.mark.slow
def test_it_follows_evictions_demotions_a_death_and_restarts(cluster: PublishingCluster) -> None:
    order = random.Random(3)
    one, two = (cluster.start_node(name, 512 << 10, 2 << 20) for name in ("one", "two"))
    with EventSubscriber(cluster.address, silence_s=1.0) as router:
        for _ in range(10_000):
            node = order.choice([one, two])
            put(node, chunk_of(order.randrange(60)))
            if order.random() < 0.2:
                node.maintain()
        assert all(n.stats().counters[c] for n in (one, two) for c in ("evictions", "demotions"))
        follow(router, cluster.stored)
        assert {"CPU", "STORAGE"} == set().union(*router.blocks.tiers.values())
        cluster.kill_node("two")
        follow(router, cluster.stored)
        cluster.start_node("two", 512 << 10, 2 << 20)  # with what is on its disk
        follow(router, cluster.stored)
        cluster.restart_coordinator()
        one.delete([chunk_of(number).chunk_id for number in range(30)])
        follow(router, cluster.stored)


def test_it_gets_a_snapshot_when_it_missed_more_than_is_kept(tmp_path: Path) -> None:
    with publishing(tmp_path, kept_batches=3) as cluster:
        node = cluster.start_node("one", 4 << 20)
        with EventSubscriber(cluster.address) as router:
            fill(node, range(3))
            follow(router, cluster.stored)
            router._last -= 10_000  # as if it had missed as many
            fill(node, range(3, 6))
            follow(router, cluster.stored)
            assert router.snapshots == 2


def test_it_asks_for_what_it_missed(cluster: PublishingCluster) -> None:
    node = cluster.start_node("one", 4 << 20)
    with EventSubscriber(cluster.address) as router:
        fill(node, range(3))
        follow(router, cluster.stored)
        batches = cluster.hub.stats()["batches"]
        router._events.unsubscribe(router._where.topic)
        fill(node, range(3, 30))
        while cluster.hub.stats()["batches"] == batches:
            time.sleep(0.01)
        time.sleep(0.1)
        router._events.subscribe(router._where.topic)
        fill(node, range(30, 33))
        follow(router, cluster.stored)
        assert router.snapshots == 1
    assert cluster.hub.stats()["replays"] >= 1


def test_a_subscriber_of_vllm_reads_it(cluster: PublishingCluster) -> None:
    """The messages on the wire: three parts, and requests as vLLM's subscribers send them."""
    fill(cluster.start_node("one"), range(3))
    while cluster.hub.stats()["blocks"] < 3:
        time.sleep(0.01)
    with zmq.Context() as context, context.socket(zmq.SUB) as sub, context.socket(zmq.DEALER) as replay:
        for made in (sub, replay):
            made.setsockopt(zmq.LINGER, 0)
            made.setsockopt(zmq.RCVTIMEO, 5000)
        sub.subscribe(b"")
        sub.connect(f"tcp://{cluster.events}")
        replay.connect(f"tcp://{cluster.events.host}:{cluster.events.port + 1}")
        time.sleep(0.2)
        fill(cluster.nodes["one"], range(3, 5))
        stored: list[Event] = []
        while not any(isinstance(event, Stored) for event in stored):
            topic, number, payload = sub.recv_multipart()
            assert topic == topic_of("")
            stored = decode_batch(payload)[1]
        replay.send_multipart([b"", encode_sequence(decode_sequence(number))])
        assert replay.recv_multipart() == [b"", topic, number, payload]
        while decode_sequence((answer := replay.recv_multipart())[2]) != END:
            assert answer[1] == topic
        assert answer == [b"", b"", encode_sequence(END), b""]


def test_malformed_requests_and_subscriptions_leave_it_working(cluster: PublishingCluster) -> None:
    node = cluster.start_node("one")
    with zmq.Context() as context, context.socket(zmq.DEALER) as replay, context.socket(zmq.SUB) as sub:
        for made in (replay, sub):
            made.setsockopt(zmq.LINGER, 0)
        replay.connect(f"tcp://{cluster.events.host}:{cluster.events.port + 1}")
        for parts in (
            [b""],
            [b"x"],
            [b"", b"short"],
            [b"", b"12345678", b"?"],
            [b"", b"1", b"2", b"3", b"4"],
        ):
            replay.send_multipart(parts)
        for topic in (b"", b"\xff\xfe", b"kv@kvstore@", topic_of("x" * 300)):
            sub.subscribe(topic)
        sub.connect(f"tcp://{cluster.events}")
        with socket.create_connection((cluster.events.host, cluster.events.port)) as raw:
            raw.sendall(bytes(range(256)) * 64)
            fill(node, range(3))
            with EventSubscriber(cluster.address) as router:
                follow(router, cluster.stored)


def test_a_router_that_reads_nothing_slows_nobody(tmp_path: Path) -> None:
    with publishing(tmp_path, kept_bytes=1 << 20) as cluster:
        node = cluster.start_node("one", 8 << 20)
        with EventSubscriber(cluster.address), EventSubscriber(cluster.address) as router:
            for _ in range(20):
                fill(node, range(200))
                node.delete([chunk.chunk_id for chunk in CHUNKS])
                router.poll(0)
            fill(node, range(7))
            follow(router, cluster.stored)


_LATE_ROUTER = """
import sys, time
from kvstore_client.kv_events import EventSubscriber

with EventSubscriber(sys.argv[1]) as router:
    while not router.blocks.tiers:
        router.poll(0.1)
    print("has the first block", flush=True)
    time.sleep(9)
    deadline_s = time.monotonic() + 15
    while len(router.blocks.tiers) < 2 or not router.is_current:
        assert time.monotonic() < deadline_s, router.blocks.tiers
        router.poll(0.1)
"""


@pytest.mark.slow
def test_a_router_that_read_nothing_for_long_goes_on(cluster: PublishingCluster) -> None:
    """In a process of its own, which libzmq aborts when heartbeats end a connection of which messages wait."""
    node = cluster.start_node("one")
    fill(node, range(1))
    command = [sys.executable, "-c", _LATE_ROUTER, cluster.address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as router:
        assert router.stdout is not None
        assert router.stdout.readline() == "has the first block\n"
        for _ in range(3000):  # more than ZeroMQ keeps for a subscriber
            cluster.hub.mark_time("")
        fill(node, range(1, 2))
        _, errors = router.communicate(timeout=60)
    assert router.returncode == 0, errors


def test_a_quiet_publisher_still_counts(tmp_path: Path) -> None:
    """By empty batches subscribers notice that the last ones are missing."""
    with publishing(tmp_path) as cluster:
        cluster.front._publisher.stop()
        cluster.front._publisher = EventPublisher(
            cluster.hub, cluster.coordinator.live, cluster.events, mark_period_s=0.1
        )
        fill(cluster.start_node("one"), range(3))
        with EventSubscriber(cluster.address) as router:
            follow(router, cluster.stored)
            last = router._last
            router._last -= 1
            deadline_s = time.monotonic() + 5
            while router._last <= last:
                router.poll(0.1)
                assert time.monotonic() < deadline_s
            follow(router, cluster.stored)


def test_who_cannot_be_reached_and_what_cannot_be_bound_is_said(cluster: PublishingCluster) -> None:
    with pytest.raises(NodeUnavailableError, match=r"no KV events: the coordinator at 127\.0\.0\.1:9 "):
        EventSubscriber("127.0.0.1:9")
    cluster.front._publisher.stop()
    taken = socket.create_server(("127.0.0.1", cluster.events.port + 1))
    with taken, pytest.raises(AddressInUseError, match="choose another --events"):
        EventPublisher(cluster.hub, cluster.coordinator.live, cluster.events)
    cluster.front._publisher = EventPublisher(cluster.hub, cluster.coordinator.live, cluster.events)


def test_a_snapshot_begins_with_a_cleared_index(cluster: PublishingCluster) -> None:
    fill(cluster.start_node("one"), range(2))
    with EventSubscriber(cluster.address) as router:
        applied = []
        while not router.is_current or not applied:
            applied += router.poll(0.1)
        assert applied[0] == Cleared()


def test_where_to_subscribe_is_told(cluster: PublishingCluster) -> None:
    with grpc.insecure_channel(cluster.address) as channel:
        reply = rpc.CoordinatorStub(channel).Events(pb.EventsRequest(tenant="a"))
    assert reply == pb.EventsReply(
        endpoint=str(cluster.events),
        replay_endpoint=f"127.0.0.1:{cluster.events.port + 1}",
        topic=b"kv@kvstore@a@",
    )
