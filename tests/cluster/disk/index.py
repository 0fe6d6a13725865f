"""A store in use, as by a storage node that knows where its chunks are."""

import shutil
import threading
from pathlib import Path

from kvstore_cluster.disk import Location, RecordMeta, SegmentStore
from kvstore_cluster.disk.file import SegmentFile
from kvstore_cluster.disk.folder import OpenFile
from kvstore_codec.errors import ChunkNotFoundError
from tests.cluster.disk.chunks import append, contents, meta_of, read, tiny
from tests.sample_chunk import SampleChunk

LIMIT = 4 << 20
SEGMENT = 128 << 10  # 15 tiny chunks
BLOCK = 4096


class Index:
    """Where chunks are, as a storage node knows it. Thread-safe."""

    def __init__(self, store: SegmentStore) -> None:
        self.store = store
        self.where: dict[int, tuple[Location, SampleChunk]] = {}
        self._lock = threading.Lock()

    def put(self, content: int, version: int = 0, *, sync: bool = False) -> None:
        chunk = tiny(content, version)
        location = append(self.store, chunk, sync=sync)
        with self._lock:
            replaced = self.where.get(content)
            self.where[content] = (location, chunk)
        if replaced is not None:
            self.store.delete(replaced[0])

    def delete(self, content: int, *, forget: bool = False) -> None:
        with self._lock:
            location, chunk = self.where.pop(content)
        self.store.delete(location)
        if forget:
            self.store.forget(meta_of(chunk), self.store.newest_sequence)

    def relocate(self, meta: RecordMeta, old: Location, new: Location) -> bool:
        with self._lock:
            for content, (location, chunk) in self.where.items():
                if location == old:
                    self.where[content] = (new, chunk)
                    return True
            return False

    def read(self, content: int) -> bytes:
        while True:
            with self._lock:
                location, chunk = self.where[content]
            try:
                return read(self.store, location, len(chunk.data))
            except ChunkNotFoundError:
                continue

    def check(self) -> None:
        for content, (_, chunk) in list(self.where.items()):
            assert self.read(content) == chunk.data
        assert self.store.live_bytes >= len(self.where) * 2 * BLOCK
        self.store.check_integrity()

    @property
    def chunks(self) -> list[SampleChunk]:
        return [chunk for _, chunk in self.where.values()]


def opened(folder: Path, open_file: OpenFile = SegmentFile, *, sync_period_s: float = 0.05) -> SegmentStore:
    return SegmentStore(
        folder, LIMIT, segment_bytes=SEGMENT, sync_period_s=sync_period_s, open_file=open_file
    )


def compact(index: Index) -> None:
    while index.store.compact(index.relocate):
        pass


def after_restart(index: Index, tmp_path: Path) -> dict[tuple[bytes, str], bytes]:
    """What a process that was killed now would find."""
    copy = tmp_path / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(tmp_path / "store", copy)
    store = opened(copy)
    found = contents(store)
    store.check_integrity()
    store.close()
    return found


def segments(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "store").glob("*.kvs"))
