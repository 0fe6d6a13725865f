"""Power is lost at any moment: of what was not synced, any pages reach the disk and any do not."""

import random
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from kvstore_cluster.disk import Location, SegmentStore
from kvstore_cluster.disk.file import SegmentFile
from tests.cluster.disk.chunks import append, read, tiny
from tests.sample_chunk import SampleChunk

LIMIT = 4 << 20
SEGMENT = 128 << 10
PAGE = 512  # a disk promises to write no more than a sector at once


@dataclass
class Disk:
    """Everything that reached the disk, in order, and what had been promised by then."""

    events: list[tuple[str, str, int, bytes]] = field(default_factory=list)
    promises: list[dict[bytes, set[bytes | None]]] = field(default_factory=list)
    folders: list[frozenset[str]] = field(default_factory=list)
    promised: dict[bytes, set[bytes | None]] = field(default_factory=dict)

    def happened(self, what: str, path: Path, offset: int = 0, data: bytes = b"") -> None:
        self.events.append((what, path.name, offset, data))
        self.promises.append({content: set(states) for content, states in self.promised.items()})
        self.folders.append(frozenset(file.name for file in path.parent.glob("*.kvs")))

    def open_file(self, path: Path, *, create: bool, direct: bool) -> SegmentFile:
        disk = self

        class RecordedFile(SegmentFile):
            def write(self, offset: int, views: list[memoryview]) -> None:  # type: ignore[override]
                data = b"".join(views)
                super().write(offset, views)
                disk.happened("write", path, offset, data + bytes(-len(data) % 4096))

            def sync(self) -> None:
                super().sync()
                disk.happened("sync", path)

        return RecordedFile(path, create=create, direct=direct)

    def after_power_loss(self, moment: int, folder: Path, generator: random.Random) -> None:
        """Writes what is left when power is lost after event `moment`."""
        share = generator.choice([0.0, 0.1, 0.5, 0.9, 1.0])
        files: dict[str, bytearray] = {}
        unsynced: dict[str, list[tuple[int, bytes]]] = {}
        for what, name, offset, data in self.events[: moment + 1]:
            if what == "write":
                unsynced.setdefault(name, []).append((offset, data))
            else:
                for written in unsynced.pop(name, []):
                    _write(files.setdefault(name, bytearray()), *written)
        for name, writes in unsynced.items():
            for offset, data in writes:
                for start in range(0, len(data), PAGE):
                    if generator.random() < share:
                        _write(
                            files.setdefault(name, bytearray()), offset + start, data[start : start + PAGE]
                        )
        for name in self.folders[moment]:
            (folder / name).write_bytes(files.get(name, b""))


def _write(file: bytearray, offset: int, data: bytes) -> None:
    file.extend(bytes(max(0, offset + len(data) - len(file))))
    file[offset : offset + len(data)] = data


class Life:
    """A store in use, and what it has promised: for each content the states that it may be found in."""

    def __init__(self, disk: Disk, store: SegmentStore, generator: random.Random) -> None:
        self.disk = disk
        self.store = store
        self.generator = generator
        self.where: dict[int, tuple[Location, SampleChunk]] = {}

    def put(self, content: int, version: int) -> None:
        chunk = tiny(content, version)
        sync = self.generator.random() < 0.5
        states = self.disk.promised.setdefault(chunk.chunk_id.content_id, {None})
        states.add(chunk.data)
        location = append(self.store, chunk, sync=sync)
        replaced = self.where.get(content)
        self.where[content] = (location, chunk)
        if sync:
            states.clear()
            states.add(chunk.data)
        if replaced is not None:
            self.store.delete(replaced[0])

    def evict(self, content: int) -> None:
        _, chunk = self.where[content]
        states = self.disk.promised[chunk.chunk_id.content_id]
        states |= {None, *(tiny(content, version).data for version in range(VERSIONS))}
        self.store.delete(self.where.pop(content)[0])

    def forget(self, content: int) -> None:
        _, chunk = self.where[content]
        states = self.disk.promised[chunk.chunk_id.content_id]
        states |= {None, *(tiny(content, version).data for version in range(VERSIONS))}
        self.store.delete(self.where.pop(content)[0], forget=True)

    def relocate(self, old: Location, new: Location) -> bool:
        for content, (location, chunk) in self.where.items():
            if location == old:
                self.where[content] = (new, chunk)
                return True
        return False

    def live(self) -> None:
        for version in range(VERSIONS):
            for content in range(20):
                self.put(content, version)
            for content in self.generator.sample(range(20), 14):
                (self.evict if self.generator.random() < 0.5 else self.forget)(content)
            while self.store.compact(self.relocate):
                pass


VERSIONS = 5


def lived(folder: Path, seed: int) -> Disk:
    disk = Disk()
    store = SegmentStore(folder, LIMIT, segment_bytes=SEGMENT, sync_period_s=1e6, open_file=disk.open_file)
    store.recover()
    life = Life(disk, store, random.Random(seed))
    life.live()
    store.check_integrity()
    store.close()
    return disk


@pytest.mark.parametrize("seed", range(4))
def test_what_was_promised_is_there(memory_folder: Path, seed: int) -> None:
    disk = lived(memory_folder / "life", seed)
    generator = random.Random(seed)
    assert sum(what == "sync" for what, *_ in disk.events) > 50
    assert len(disk.folders[-1]) < len(frozenset().union(*disk.folders))  # compaction has removed some
    for number in range(150):
        folder = memory_folder / f"loss-{number}"
        folder.mkdir()
        moment = generator.randrange(len(disk.events))
        disk.after_power_loss(moment, folder, generator)
        store = SegmentStore(folder, LIMIT, segment_bytes=SEGMENT)
        found = {
            meta.chunk_id.content_id: read(store, location, meta.size_bytes)
            for meta, location in store.recover().records
        }
        for content, states in disk.promises[moment].items():
            assert found.get(content) in states, (moment, content.hex())
        assert found.keys() <= disk.promises[moment].keys()
        store.check_integrity()
        append(store, tiny(1000))
        store.close()
