"""Faults of a cluster: for each alert about nodes, what really makes it fire."""

import errno
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest

from kvstore_cluster.durability import Durability
from kvstore_cluster.put import PutOptions
from kvstore_codec.errors import ChunkNotFoundError, StorageError
from tests.damage import flip_bit
from tests.sample_chunk import SampleChunk, sample_chunk
from tests.service.observability.watched import WatchedCluster, WatchedNode

CHUNK_FRAME_BYTES = 40_000
"""A few of such chunks fill a node."""


def store(
    watched: WatchedNode, chunk: SampleChunk, *, durability: Durability = Durability.DEFAULT, tenant: str = ""
) -> bool:
    """Whether the node stored the chunk."""
    options = PutOptions(tenant=tenant, durability=durability)
    try:
        put = watched.node.begin_put(chunk.chunk_id, chunk.encoding, len(chunk.data), options=options)
        if put is not None:
            put.write(chunk.data)
            put.commit()
    except StorageError:
        return False
    return True


def stop_coordinator(cluster: WatchedCluster) -> None:
    cluster.server.stop(0)


def stop_node(cluster: WatchedCluster) -> None:
    cluster.nodes[0].stop_serving()


def store_too_much(cluster: WatchedCluster) -> None:
    for number in range(60):
        assert store(cluster.nodes[1], sample_chunk(number, frame_bytes=CHUNK_FRAME_BYTES))


def damage_memory(cluster: WatchedCluster) -> None:
    (watched,) = cluster.nodes
    chunk = sample_chunk(1)
    assert store(watched, chunk)
    with watched.node.open(chunk.chunk_id, chunk.encoding) as reader:
        flip_bit(next(iter(reader.pieces(0, 1, 1 << 10)))[0])
    assert watched.node.verify(chunk.chunk_id, chunk.encoding)


def exceed_quota(cluster: WatchedCluster) -> None:
    cluster.coordinator.set_quota("small", 1 << 10)
    cluster.tell()
    assert not store(cluster.nodes[0], sample_chunk(2), tenant="small")


def fail_to_read(cluster: WatchedCluster) -> None:
    (watched,) = cluster.nodes
    chunk = sample_chunk(3)
    assert store(watched, chunk)
    watched.node.limit_disk(1e9)  # the chunk leaves memory
    watched.faults.reading = errno.EIO
    try:
        with (
            pytest.raises(ChunkNotFoundError),
            watched.node.open(chunk.chunk_id, chunk.encoding) as reader,
        ):
            for _ in reader.pieces(0, 0, 1 << 20):
                pass
    finally:
        watched.faults.reading = None
        watched.node.limit_disk(None)


def fill_file_system(cluster: WatchedCluster) -> None:
    for number in range(100, 120):  # content, of which what the full disk evicts is a small part
        assert store(cluster.nodes[0], sample_chunk(number))
    cluster.nodes[0].faults.writing = errno.ENOSPC
    assert store(cluster.nodes[0], sample_chunk(4)), "it stays in memory"
    cluster.nodes[0].faults.writing = None


def fail_to_sync(cluster: WatchedCluster) -> None:
    cluster.nodes[0].faults.syncing = errno.EIO
    assert not store(cluster.nodes[0], sample_chunk(5), durability=Durability.DURABLE)


def fill_memory(cluster: WatchedCluster) -> None:
    """Nothing more fits into the second node."""
    watched = cluster.nodes[1]
    for number in range(100, 200):
        chunk = sample_chunk(number, frame_bytes=CHUNK_FRAME_BYTES)
        cluster.coordinator.pin([chunk.chunk_id])
        watched.node.set_pins({"": cluster.coordinator.pins()})
        if not store(watched, chunk):
            return
    raise AssertionError("everything fitted")


def lack_room_for_replicas(cluster: WatchedCluster) -> None:
    assert store(cluster.nodes[0], sample_chunk(1, frame_bytes=CHUNK_FRAME_BYTES))
    cluster.coordinator.repair()


def drain_into_full_node(cluster: WatchedCluster) -> None:
    cluster.coordinator.drain("node-0")


@dataclass(frozen=True)
class Scene:
    """A cluster, and faults that are made in it one after the other, by the alert that each causes."""

    options: Mapping[str, Any]
    faults: Mapping[str, Callable[[WatchedCluster], None]]


SCENES = {
    "coordinator": Scene({"nodes": 1}, {"KVStoreCoordinatorDown": stop_coordinator}),
    "loss": Scene(
        {"nodes": 2, "disk_bytes": 0}, {"KVStoreNodeDown": stop_node, "KVStoreEvictsMuch": store_too_much}
    ),
    "disk": Scene(
        {"nodes": 1},
        {
            "KVStoreDamagedChunks": damage_memory,
            "KVStoreQuotaRefusesChunks": exceed_quota,
            "KVStoreDiskUnreadable": fail_to_read,
            "KVStoreDiskRefusesChunks": fill_file_system,
            "KVStoreDiskFailed": fail_to_sync,
        },
    ),
    "room": Scene(
        {"nodes": 2, "disk_bytes": 0},
        {
            "KVStoreMemoryRefusesChunks": fill_memory,
            "KVStoreReplicasMissing": lack_room_for_replicas,
            "KVStoreDrainStuck": drain_into_full_node,
        },
    ),
}
