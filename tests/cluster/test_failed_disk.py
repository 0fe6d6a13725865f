"""Maintenance while a node's disk has failed."""

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore_cluster.arena import Arena
from kvstore_cluster.disk import SegmentStore
from kvstore_cluster.node import StorageNode
from kvstore_codec.errors import DiskFailedError
from tests.cluster.disk.test_faults import Faults
from tests.sample_chunk import SampleChunk, sample_chunk
from tests.service.storage_calls import wait_until


@pytest.fixture
def faults() -> Faults:
    return Faults()


@pytest.fixture
def node(tmp_path: Path, faults: Faults) -> Iterator[StorageNode]:
    store = SegmentStore(
        tmp_path, 16 << 20, segment_bytes=1 << 20, sync_period_s=0.05, open_file=faults.open_file
    )
    node = StorageNode("node-0", Arena(1 << 20, 4 << 10), store=store)
    yield node
    faults.writing = None
    node.close()


def store(node: StorageNode, chunk: SampleChunk) -> None:
    put = node.begin_put(chunk.chunk_id, chunk.encoding, len(chunk.data))
    assert put is not None
    put.write(chunk.data)
    assert put.commit()
    while node.maintain():
        pass


def test_a_failed_disk_is_told_and_is_no_failure_of_maintenance(node: StorageNode, faults: Faults) -> None:
    for number in range(3):
        store(node, sample_chunk(number))
    faults.writing = errno.EIO
    with pytest.raises(DiskFailedError):  # the caller hears that a restart may recover the chunk
        node.delete([sample_chunk(0).chunk_id])
    for _ in range(3):
        node.maintain()
    assert "check that disk" in node.stats().disk_error
    faults.writing = None
    wait_until(lambda: not node.stats().disk_error)  # the disk tries itself again
    node.maintain()
