"""Fixtures of the tests of storage nodes."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore_cluster.arena import Arena
from kvstore_cluster.disk import SegmentStore
from kvstore_cluster.durability import Durability
from kvstore_cluster.eviction import POLICIES
from kvstore_cluster.leases import LeaseTable
from kvstore_cluster.node import StorageNode
from kvstore_cluster.slow_disk import SlowNode, SlowStore
from tests.clock import Clock
from tests.cluster.disk_node import BLOCK, DISK, MEMORY, SEGMENT, Opener


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def opened(tmp_path: Path, clock: Clock) -> Iterator[Opener]:
    """Opens the node on the same disk; the one opened before is given up without a farewell."""
    nodes: list[tuple[StorageNode, SegmentStore]] = []

    def start(
        *,
        disk_bytes: int = DISK,
        policy: str = "lru",
        durability: Durability = Durability.RELAXED,
        experiments: bool = False,
    ) -> StorageNode:
        if nodes:
            nodes[-1][1].close()
        store_type, node_type = (SlowStore, SlowNode) if experiments else (SegmentStore, StorageNode)
        store = store_type(tmp_path / "disk", disk_bytes, segment_bytes=SEGMENT)
        node = node_type(
            "node-0",
            Arena(MEMORY, BLOCK),
            store=store,
            durability=durability,
            policy=POLICIES[policy],
            leases=LeaseTable(clock=clock),
            clock=clock,
        )
        nodes.append((node, store))
        return node

    yield start
    nodes[-1][0].check_integrity()
    nodes[-1][1].close()
