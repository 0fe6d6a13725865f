"""Scans all records of a segment with large sequential reads, and verifies them."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass

from kvstore_cluster.disk.file import SegmentFile, aligned_buffer
from kvstore_cluster.disk.layout import RecordLayout
from kvstore_cluster.disk.record import (
    BLOCK_BYTES,
    Kind,
    RecordHeader,
    decode,
    header_length,
)
from kvstore_codec.errors import ChunkFormatError, ForeignChunkError
from kvstore_codec.whole_chunk import verify_chunk

log = logging.getLogger(__name__)

_WINDOW_BYTES = 4 << 20


class Window:
    """A read-ahead buffer over a file. A view is valid until the next call of `view`."""

    def __init__(self, file: SegmentFile) -> None:
        self._file = file
        self._buffer = aligned_buffer(_WINDOW_BYTES)
        self._start = self._end = 0

    def view(self, offset: int, length: int) -> memoryview:
        """Up to `length` bytes from a block's offset on, fewer at the end of the file. Raises OSError."""
        if not self._start <= offset <= offset + length <= self._end:
            if length > self._buffer.nbytes:
                self._buffer = aligned_buffer(length + -length % BLOCK_BYTES)
            self._start = self._end = offset
            try:
                self._end += self._file.read_some(offset, self._buffer)
            except OSError:  # the failure may be in the part that is only read ahead
                self._end += self._file.read_some(offset, self._buffer[: length + -length % BLOCK_BYTES])
        return self._buffer[offset - self._start : min(offset + length, self._end) - self._start]


@dataclass(frozen=True, slots=True)
class Found:
    """A sound record: the bytes of its header, and the decoded header."""

    first_block: int
    header: memoryview
    says: RecordHeader


@dataclass(frozen=True, slots=True)
class Lost:
    """Consecutive blocks without a sound record, and the reason."""

    first_block: int
    blocks: int
    reason: str


def sound_chunk(record: memoryview, layout: RecordLayout, first: int, says: RecordHeader) -> memoryview:
    """The chunk of the record at block `first`, whose bytes are `record`. Raises ChunkFormatError unless it is sound
    and the one that its header announces."""
    chunk = layout.chunk(first, record[BLOCK_BYTES:], says.meta.size_bytes)
    found = verify_chunk(chunk, says.meta.size_bytes)
    if (found.chunk_id, found.encoding.name) != (says.meta.chunk_id, says.meta.encoding):
        raise ForeignChunkError(
            f"chunk {found.chunk_id.short} lies in the place of {says.meta.chunk_id.short}"
        )
    if found.header_bytes != says.meta.header_bytes:
        raise ForeignChunkError(f"its header has {found.header_bytes} bytes, not {says.meta.header_bytes}")
    return chunk


def scan(file: SegmentFile, layout: RecordLayout, end_block: int) -> Iterator[Found | Lost]:
    """Yields every verified record of a segment and every damaged range, in order. Skips a damaged chunk by the length
    in its header, and a damaged header block by block. Views are valid until the next iteration."""
    window = Window(file)
    block = lost_from = 1
    while block < end_block:
        header = layout.header(block, _readable(window, block * BLOCK_BYTES, BLOCK_BYTES))
        if header is None:
            block += 1
            continue
        if lost_from < block:
            yield Lost(lost_from, block - lost_from, "no sound record header")
        says = decode(header)
        header = memoryview(bytes(header[: header_length(header)]))  # the window moves on
        blocks, damage = 1, None
        if says.kind is Kind.PUT:
            blocks += layout.data_blocks(says.meta.size_bytes)
            if block + blocks > end_block:
                blocks, damage = end_block - block, "the segment ends within it"
            else:
                record = _readable(window, block * BLOCK_BYTES, blocks * BLOCK_BYTES)
                try:
                    sound_chunk(record, layout, block, says)
                except ChunkFormatError as error:
                    damage = str(error)
        if damage is None:
            yield Found(block, header, says)
        else:
            yield Lost(block, blocks, f"chunk {says.meta.chunk_id.short} in {says.meta.encoding}: {damage}")
        block += blocks
        lost_from = block
    if lost_from < end_block:
        yield Lost(lost_from, end_block - lost_from, "no sound record header")


def _readable(window: Window, offset: int, length: int) -> memoryview:
    """Reads a range. Returns an empty view when the disk cannot read all of it."""
    try:
        return window.view(offset, length)
    except OSError as error:
        log.warning("%d bytes at offset %d of a segment cannot be read: %s", length, offset, error)
        return memoryview(b"")
