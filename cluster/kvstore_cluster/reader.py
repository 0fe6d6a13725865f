"""Reads stored chunks in frame ranges."""

from collections.abc import Iterable, Iterator
from functools import cached_property

from kvstore_cluster.catalog import ChunkCatalog
from kvstore_cluster.disk_tier import DiskTier
from kvstore_cluster.frame_plan import bytes_of_frames
from kvstore_cluster.migration import Migration
from kvstore_cluster.residency import Residency
from kvstore_codec.chunk import ChunkHeader, read_header


class ChunkBytes:
    """Reads the bytes of acquired chunks from memory or from disk."""

    def __init__(
        self, catalog: ChunkCatalog, disk: DiskTier, migration: Migration, residency: Residency
    ) -> None:
        self._catalog = catalog
        self._disk = disk
        self._migration = migration
        self._residency = residency

    def known_header(self, slot: int) -> bytes | None:
        """The chunk's header. None when it must be read from disk. Call with the lock held."""
        catalog = self._catalog
        extent = catalog.index.extent[slot]
        if extent is None:
            return catalog.disk_headers.get(slot)
        return catalog.arena.beginning(extent, catalog.index.header_bytes[slot])

    def header(self, slot: int) -> bytes:
        """The chunk's header. May block; call without the lock. Raises ChunkNotFoundError when the chunk was removed,
        or the disk has lost it or cannot read it."""
        with self._catalog.lock:
            header = self.known_header(slot)
        return self._disk.reads.header(slot) if header is None else header

    def views(self, slot: int, offset: int, length: int) -> Iterator[memoryview]:
        """Views that together are these bytes, in order. A large range of a chunk on disk first promotes the whole
        chunk to memory; a small range is read from disk alone. May block; call without the lock. Raises
        ChunkNotFoundError as `header` does."""
        index = self._catalog.index
        extent = index.extent[slot]
        if extent is None and self._residency.promotes(length, index.size_bytes[slot]):
            extent = self._migration.promote(slot)
        if extent is not None:
            return self._catalog.arena.views(extent, offset, length)
        return iter([self._disk.reads.frames(slot, offset, length, lambda: self.header(slot))])


class ChunkReader:
    """Reads one chunk, which is not removed while the reader is open. Created by `StorageNode.open`."""

    def __init__(self, source: ChunkBytes, slot: int, size_bytes: int) -> None:
        self._source = source
        self._slot = slot
        self.size_bytes = size_bytes
        self.ranges_read = 0
        self.bytes_read = 0

    @cached_property
    def header(self) -> ChunkHeader:
        return read_header(self._source.header(self._slot))

    def range_bytes(self, first_frame: int, frame_count: int) -> int:
        """Total size of the pieces of these frames, bytes. Raises FrameRangeError."""
        return self._range(first_frame, frame_count)[1]

    def pieces(self, first_frame: int, frame_count: int, piece_bytes: int) -> Iterator[list[memoryview]]:
        """The bytes of the frames, in order, in pieces of at most `piece_bytes`. 0 frames from frame 0 mean the whole
        chunk with its header. A piece is a list of read-only views, because a chunk may occupy several runs of the
        arena. Raises FrameRangeError, and ChunkNotFoundError when the disk has lost the chunk."""
        offset, length = self._range(first_frame, frame_count)
        self.ranges_read += 1
        for piece in pieces_of(self._source.views(self._slot, offset, length), piece_bytes):
            self.bytes_read += sum(view.nbytes for view in piece)
            yield piece

    def _range(self, first_frame: int, frame_count: int) -> tuple[int, int]:
        if first_frame == frame_count == 0:
            return 0, self.size_bytes
        return bytes_of_frames(self.header, first_frame, frame_count)


def pieces_of(views: Iterable[memoryview], piece_bytes: int) -> Iterator[list[memoryview]]:
    """The bytes of the views, read-only and in order, in pieces of at most `piece_bytes`."""
    piece: list[memoryview] = []
    room = piece_bytes
    for view in views:
        rest = view.toreadonly()
        while rest.nbytes:
            part, rest = rest[:room], rest[room:]
            piece.append(part)
            room -= part.nbytes
            if not room:
                yield piece
                piece, room = [], piece_bytes
    if piece:
        yield piece
