"""The bytes of a segment, to be cut and damaged."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kvstore_cluster.disk import SegmentStore
from tests.cluster.disk.chunks import append, by_key, contents, read, tiny
from tests.sample_chunk import SampleChunk

LIMIT = 8 << 20
BLOCK = 4096
SEGMENT = "segment-00000001.kvs"
INDEX = "segment-00000001.index"


@dataclass(frozen=True)
class Image:
    """The bytes of a segment with one record after the other, and where the records are."""

    data: bytes
    chunks: list[SampleChunk]
    starts: list[int]

    def written(self, record: int) -> Iterator[range]:
        """Where the header and the chunk of a record lie, without padding."""
        start = self.starts[record]
        header_bytes = int.from_bytes(self.data[start + 6 : start + 8], "little")
        yield range(start, start + header_bytes)
        yield range(start + BLOCK, start + BLOCK + len(self.chunks[record].data))

    def end(self, record: int) -> int:
        return self.starts[record] + BLOCK + len(self.chunks[record].data)

    def positions(self, first_record: int, step: int) -> Iterator[int]:
        """Every byte that is written from a record on, and every `step`-th of the padding."""
        parts = [part for record in range(first_record, len(self.chunks)) for part in self.written(record)]
        for at in range(self.starts[first_record], len(self.data)):
            if at % step == 0 or any(at in part for part in parts):
                yield at


def make_image(folder: Path) -> Image:
    store = SegmentStore(folder, LIMIT)
    store.recover()
    chunks = [tiny(content) for content in range(4)]
    locations = [append(store, chunk) for chunk in chunks]
    data = (folder / SEGMENT).read_bytes()
    store.close()
    return Image(data, chunks, [location % (1 << 24) * BLOCK for location in locations])


def with_segment(folder: Path, data: bytes) -> SegmentStore:
    """A store that finds one segment without an index."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / SEGMENT).write_bytes(data)
    return SegmentStore(folder, LIMIT)


def check(store: SegmentStore, expected: list[SampleChunk], *, lost: bool) -> None:
    recovery = store.recover()
    found = {
        (meta.chunk_id.content_id, meta.encoding): read(store, location, meta.size_bytes)
        for meta, location in recovery.records
    }
    assert found == by_key(expected)
    assert bool(recovery.dropped) == lost
    store.check_integrity()


def goes_on(store: SegmentStore, folder: Path, expected: list[SampleChunk]) -> None:
    """Appends, and finds everything once more, twice: by the index and without."""
    append(store, tiny(99))
    store.close()
    for removed in ((), folder.glob("*.index")):
        for path in removed:
            path.unlink()
        again = SegmentStore(folder, LIMIT)
        assert contents(again) == by_key([*expected, tiny(99)])
        again.close()
