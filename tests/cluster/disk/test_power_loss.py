"""Power is lost at any moment: of what was not synced, any sectors reach the disk and any do not."""

import random
import threading
from pathlib import Path

import pytest

from kvstore_cluster.disk import SegmentStore
from tests.cluster.disk.chunks import append, read, tiny
from tests.cluster.disk.index import Index, opened
from tests.cluster.disk.recorder import Recorder

VERSIONS = 5
CONTENTS = 20

States = set[bytes | None]


class LossyDisk(Recorder):
    """Loses power now and then, checks what a store finds, and goes on as if nothing had happened."""

    def __init__(self, folder: Path, seed: int) -> None:
        super().__init__(folder)
        self.generator = random.Random(seed)
        self.promised: dict[bytes, States] = {}
        self.losses = 0
        self.promising = threading.current_thread()

    def happened(self) -> None:
        # In the thread that makes promises, so that none is made meanwhile.
        if threading.current_thread() is self.promising and self.generator.random() < 0.5:
            self.losses += 1
            folder = self.folder.with_name(f"loss-{self.losses}")
            folder.mkdir()
            self.after_power_loss(folder, self.generator)
            self.check(folder)

    def check(self, folder: Path) -> None:
        store = opened(folder)
        found = {
            meta.chunk_id.content_id: read(store, location, meta.size_bytes)
            for meta, location in store.recover().records
        }
        for content, states in self.promised.items():
            assert found.get(content) in states, (self.losses, content.hex())
        assert found.keys() <= self.promised.keys()
        store.check_integrity()
        append(store, tiny(1000))
        store.close()


def put(disk: LossyDisk, index: Index, content: int, version: int) -> None:
    """Either state may be found while it is under way, and until it is synced."""
    chunk = tiny(content, version)
    sync = disk.generator.random() < 0.5
    states = disk.promised.setdefault(chunk.chunk_id.content_id, {None})
    states.add(chunk.data)
    index.put(content, version, sync=sync)
    if sync:
        states &= {chunk.data}


def delete(disk: LossyDisk, index: Index, content: int) -> None:
    """Its older versions may come back as well."""
    states = disk.promised[tiny(content).chunk_id.content_id]
    states |= {None, *(tiny(content, version).data for version in range(VERSIONS))}
    index.delete(content, forget=disk.generator.random() < 0.5)


@pytest.mark.parametrize("seed", range(6))
def test_what_was_promised_is_there(memory_folder: Path, seed: int) -> None:
    folder = memory_folder / "store"
    disk = LossyDisk(folder, seed)
    store: SegmentStore = opened(folder, disk.open_file, sync_period_s=1e6)
    store.recover()
    index = Index(store)
    for version in range(VERSIONS):
        for content in range(CONTENTS):
            put(disk, index, content, version)
        for content in disk.generator.sample(range(CONTENTS), 14):
            delete(disk, index, content)
        while store.compact(index.relocate):
            pass
    index.check()
    store.close()
    assert disk.losses > 50
    assert not (folder / "segment-00000001.kvs").exists(), "compaction has removed some"
