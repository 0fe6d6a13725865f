"""How the records of a segment lie in its file: plainly, or encrypted (`encrypted_layout`).

A record is a header block, followed by the data blocks of its chunk. The first block of a segment says which layout it
has, and each record of a segment has the same one.
"""

from collections.abc import Sequence
from typing import Protocol

from kvstore_cluster.disk.file import SegmentFile
from kvstore_cluster.disk.record import BLOCK_BYTES, blocks_of, is_header


class RecordLayout(Protocol):
    """Writes and reads the records of one segment. Thread-safe; methods that take a file may block and raise
    OSError."""

    @property
    def seed(self) -> int:
        """Secret random number of the segment, which seeds the checksums of its headers."""

    @property
    def key_name(self) -> str:
        """Id of the key that encrypts the segment. Empty for a plain one."""

    @property
    def header_room_bytes(self) -> int:
        """Most bytes of a record header."""

    @property
    def writes_once(self) -> bool:
        """Whether no block may be written a second time, not even after its first write failed."""

    @property
    def index_overhead_bytes(self) -> int:
        """The index file is so much longer than the index."""

    def data_blocks(self, size_bytes: int) -> int:
        """Number of data blocks of a chunk."""

    def capacity_bytes(self, data_blocks: int) -> int:
        """Size of the largest chunk that fits into so many data blocks."""

    def write(self, file: SegmentFile, first: int, header: bytes, views: Sequence[memoryview]) -> None:
        """Writes a record from its first block on."""

    def read(
        self, file: SegmentFile, first: int, data_blocks: int, offset: int, views: Sequence[memoryview]
    ) -> None:
        """Fills the views with the bytes of a chunk from `offset` on; what reaches behind its data blocks stays as it
        is. Raises ChecksumError for encrypted blocks that were changed."""

    def header(self, block: int, data: memoryview) -> memoryview | None:
        """The header in a block, whose bytes are `data`. None when there is no sound one. The view may be one of
        `data`."""

    def chunk(self, first: int, data: memoryview, size_bytes: int) -> memoryview:
        """The chunk in `data`, all data blocks of the record at block `first`. The view may be one of `data`. Raises
        ChecksumError for encrypted blocks that were changed."""

    def index_file(self, index: bytes) -> bytes:
        """The bytes of a file with an index."""

    def index_in(self, data: bytes) -> bytes:
        """The index in the bytes of its file. Raises ChecksumError for encrypted ones that were changed."""


class PlainLayout:
    """Headers and chunks as they are, padded with zeros to whole blocks."""

    key_name = ""
    header_room_bytes = BLOCK_BYTES
    writes_once = False
    index_overhead_bytes = 0

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def data_blocks(self, size_bytes: int) -> int:
        return blocks_of(size_bytes)

    def capacity_bytes(self, data_blocks: int) -> int:
        return data_blocks * BLOCK_BYTES

    def write(self, file: SegmentFile, first: int, header: bytes, views: Sequence[memoryview]) -> None:
        file.write(first * BLOCK_BYTES, [memoryview(header.ljust(BLOCK_BYTES, b"\0")), *views])

    def read(
        self,
        file: SegmentFile,
        first: int,
        data_blocks: int,
        offset: int,
        views: Sequence[memoryview],
    ) -> None:
        left_bytes = self.capacity_bytes(data_blocks) - offset
        wanted = []
        for view in views:
            # Beside encrypted segments, reads come in units that may end behind a plain chunk, and behind its file.
            part = view[: max(0, left_bytes)]
            left_bytes -= part.nbytes
            if part.nbytes:
                wanted.append(part)
        file.read((first + 1) * BLOCK_BYTES + offset, wanted)

    def header(self, block: int, data: memoryview) -> memoryview | None:  # noqa: ARG002
        return data if is_header(data, self.seed) else None

    def chunk(self, first: int, data: memoryview, size_bytes: int) -> memoryview:  # noqa: ARG002
        return data[:size_bytes]

    def index_file(self, index: bytes) -> bytes:
        return index

    def index_in(self, data: bytes) -> bytes:
        return data
