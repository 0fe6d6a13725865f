"""Faults of a cluster: for each alert about nodes, what really makes it fire."""

import errno
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from kvstore_cluster.durability import Durability
from kvstore_cluster.put import PutOptions
from kvstore_codec.errors import ChunkNotFoundError, StorageError
from tests.damage import flip_bit
from tests.sample_chunk import SampleChunk, sample_chunk
from tests.service.observability.watched import WatchedCluster, WatchedNode

CHUNK_FRAME_BYTES = 40_000
"""A few of such chunks fill a node."""
_NO_DISK = {"disk_bytes": 0}


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


def chunks(count: int) -> Iterator[SampleChunk]:
    return (sample_chunk(number, frame_bytes=CHUNK_FRAME_BYTES) for number in range(count))


def fill_with_pinned(cluster: WatchedCluster, watched: WatchedNode) -> None:
    """Nothing more fits into the node."""
    for number in range(100, 200):
        chunk = sample_chunk(number, frame_bytes=CHUNK_FRAME_BYTES)
        cluster.coordinator.pin([chunk.chunk_id])
        watched.node.set_pins({"": cluster.coordinator.pins()})
        if not store(watched, chunk):
            return
    raise AssertionError("everything fitted")


def stop_coordinator(cluster: WatchedCluster) -> None:
    cluster.server.stop(0)


def stop_node(cluster: WatchedCluster) -> None:
    cluster.nodes[0].stop_serving()


def fail_to_sync(cluster: WatchedCluster) -> None:
    cluster.nodes[0].faults.syncing = errno.EIO
    assert not store(cluster.nodes[0], sample_chunk(1), durability=Durability.DURABLE)


def fill_file_system(cluster: WatchedCluster) -> None:
    cluster.nodes[0].faults.writing = errno.ENOSPC
    assert store(cluster.nodes[0], sample_chunk(1)), "it stays in memory"


def fail_to_read(cluster: WatchedCluster) -> None:
    (watched,) = cluster.nodes
    chunk = sample_chunk(1)
    assert store(watched, chunk)
    watched.node.limit_disk(1e9)  # the chunk leaves memory
    watched.faults.reading = errno.EIO
    try:
        with watched.node.open(chunk.chunk_id, chunk.encoding) as reader:
            for _ in reader.pieces(0, 0, 1 << 20):
                pass
    except ChunkNotFoundError:
        return
    raise AssertionError("the chunk was read")


def damage_memory(cluster: WatchedCluster) -> None:
    (watched,) = cluster.nodes
    chunk = sample_chunk(1)
    assert store(watched, chunk)
    with watched.node.open(chunk.chunk_id, chunk.encoding) as reader:
        flip_bit(next(iter(reader.pieces(0, 1, 1 << 10)))[0])
    assert watched.node.verify(chunk.chunk_id, chunk.encoding)


def fill_memory(cluster: WatchedCluster) -> None:
    fill_with_pinned(cluster, cluster.nodes[0])


def exceed_quota(cluster: WatchedCluster) -> None:
    cluster.coordinator.set_quota("small", 1 << 10)
    cluster.tell()
    assert not store(cluster.nodes[0], sample_chunk(1), tenant="small")


def store_too_much(cluster: WatchedCluster) -> None:
    for chunk in chunks(60):
        assert store(cluster.nodes[0], chunk)


def lack_room_for_replicas(cluster: WatchedCluster) -> None:
    first, second = cluster.nodes
    fill_with_pinned(cluster, second)
    assert store(first, sample_chunk(1, frame_bytes=CHUNK_FRAME_BYTES))
    cluster.coordinator.repair()


def drain_into_full_node(cluster: WatchedCluster) -> None:
    lack_room_for_replicas(cluster)
    cluster.coordinator.drain("node-0")


@dataclass(frozen=True)
class Fault:
    make: Callable[[WatchedCluster], None]
    options: Mapping[str, Any] = field(default_factory=dict)
    """How the cluster has to be made."""
    also: frozenset[str] = frozenset()
    """Further alerts that it causes."""


FAULTS: Mapping[str, Fault] = {
    "KVStoreCoordinatorDown": Fault(stop_coordinator),
    "KVStoreNodeDown": Fault(stop_node, {"nodes": 2}),
    "KVStoreDiskFailed": Fault(fail_to_sync),
    "KVStoreDiskRefusesChunks": Fault(fill_file_system, also=frozenset({"KVStoreDiskFailed"})),
    "KVStoreDiskUnreadable": Fault(fail_to_read),
    "KVStoreDamagedChunks": Fault(damage_memory),
    "KVStoreMemoryRefusesChunks": Fault(fill_memory, _NO_DISK),
    "KVStoreQuotaRefusesChunks": Fault(exceed_quota),
    "KVStoreEvictsMuch": Fault(store_too_much, _NO_DISK),
    "KVStoreReplicasMissing": Fault(
        lack_room_for_replicas, {"nodes": 2} | _NO_DISK, frozenset({"KVStoreMemoryRefusesChunks"})
    ),
    "KVStoreDrainStuck": Fault(
        drain_into_full_node,
        {"nodes": 2} | _NO_DISK,
        frozenset({"KVStoreMemoryRefusesChunks", "KVStoreReplicasMissing"}),
    ),
}
