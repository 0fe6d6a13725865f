"""Reads chunks from a node's disk, verifies them, and tells lost chunks from those that the disk fails to read."""

import logging
import time
from bisect import bisect_left
from collections.abc import Callable
from typing import NoReturn

from kvstore_cluster import disk_times
from kvstore_cluster.catalog import HEADER_CACHE_BYTES, ChunkCatalog
from kvstore_cluster.disk import Location
from kvstore_cluster.index import NOWHERE, ChunkIndex
from kvstore_codec.chunk import read_header
from kvstore_codec.errors import (
    ChunkFormatError,
    ChunkNotFoundError,
    DiskError,
    ForeignChunkError,
    UnsupportedVersionError,
)
from kvstore_codec.whole_chunk import verify_chunk

log = logging.getLogger(__name__)

_LARGE_READ_BYTES = 64 << 10
_MEASURED_BYTES = 8 << 20


class LostChunkError(ChunkNotFoundError):
    """The disk copy of the chunk was dropped, because it is damaged or has a format version that is no longer read."""


class UnreadableChunkError(ChunkNotFoundError):
    """The disk failed to read the chunk, in every attempt. The copy stays, because a later read may succeed."""


class DiskReads:
    """Reads acquired chunks from disk, and drops damaged copies. Every method may block; call without the lock."""

    def __init__(self, catalog: ChunkCatalog) -> None:
        self._catalog = catalog
        self._index = catalog.index
        self._measured_bytes, self._measured_s = 0, 0.0

    @property
    def bytes_per_s(self) -> int:
        """Measured rate of one read at a time, 0 before enough was read."""
        if self._measured_bytes < _MEASURED_BYTES:
            return 0
        return int(self._measured_bytes / max(self._measured_s, 1e-9))

    def header(self, slot: int) -> bytes:
        """The header of the chunk. Raises ChunkNotFoundError when the chunk was removed, is lost or cannot be read."""
        buffer = bytearray(self._index.header_bytes[slot])
        self._read(slot, 0, [memoryview(buffer)])
        header = bytes(buffer)
        try:
            read_header(header)
        except ChunkFormatError as error:
            self._lose(slot, error)
        with self._catalog.lock:
            if self._index.is_linked(slot) and len(header) <= HEADER_CACHE_BYTES:
                self._catalog.disk_headers[slot] = header
        return header

    def chunk(self, slot: int, views: list[memoryview]) -> None:
        """Reads the whole chunk into the views. Raises ChunkNotFoundError as `header` does."""
        self._read(slot, 0, views)
        try:
            require_sound(self._index, slot, views)
        except ChunkFormatError as error:
            self._lose(slot, error)

    def frames(self, slot: int, offset: int, length: int, header: Callable[[], bytes]) -> memoryview:
        """`length` bytes of a chunk from `offset`: whole frames, or the whole chunk. Calls `header` for the chunk's
        header when it needs it. Raises ChunkNotFoundError as the method `header` does."""
        data = memoryview(bytearray(length))
        if offset == 0:
            self.chunk(slot, [data])
            return data
        self._read(slot, offset, [data])
        says = read_header(header())
        first, end = (
            bisect_left(range(len(says.frame_lengths)), at, key=says.frame_offset)
            for at in (offset, offset + length)
        )
        try:
            says.verify_frames(first, end - first, data)
        except ChunkFormatError as error:
            self._lose(slot, error)
        return data

    def blocks(self, slot: int, offset: int, view: memoryview) -> None:
        """Fills an aligned view with the chunk's bytes from `offset` on, a multiple of the block size. The last block
        may end behind the chunk. The bytes are not verified: the caller does that, and calls `drop` for damage. Raises
        ChunkNotFoundError as `header` does."""
        self._read(slot, offset, [view])

    def _read(self, slot: int, offset: int, views: list[memoryview]) -> None:
        """Reads part of a chunk. Tries again when compaction moves the record meanwhile."""
        catalog, index = self._catalog, self._index
        short = index.chunk_id(slot).short
        location = NOWHERE
        while True:
            with catalog.lock:
                previous, location = location, Location(index.location[slot])
            if location in (NOWHERE, previous) or catalog.store is None:
                raise ChunkNotFoundError(f"chunk {short} was removed from {catalog.node_id}")
            try:
                started_s = time.perf_counter()
                catalog.store.read(location, offset, views)
                took_s = time.perf_counter() - started_s
                size_bytes = sum(view.nbytes for view in views)
                self._measure(size_bytes, took_s)
                disk_times.record(took_s, size_bytes)
            except ChunkNotFoundError:
                continue
            except ChunkFormatError as error:
                self._lose(slot, error)
            except DiskError as error:
                log.warning("%s cannot read chunk %s from its disk: %s", catalog.node_id, short, error)
                with catalog.lock:
                    catalog.counters.disk_read_errors += 1
                    if index.is_linked(slot):
                        catalog.unreadable.add(slot)
                raise UnreadableChunkError(
                    f"the disk of {catalog.node_id} cannot read chunk {short} now: {error}"
                ) from error
            if slot in catalog.unreadable:
                with catalog.lock:
                    catalog.unreadable.discard(slot)
            return

    def _measure(self, size_bytes: int, seconds: float) -> None:
        """Small reads are left out: they measure the latency of the disk."""
        if size_bytes >= _LARGE_READ_BYTES:
            with self._catalog.lock:
                if self._measured_bytes > 64 * _MEASURED_BYTES:  # so that the latest reads count most
                    self._measured_bytes //= 2
                    self._measured_s /= 2
                self._measured_bytes += size_bytes
                self._measured_s += seconds

    def drop(self, slot: int, error: ChunkFormatError) -> None:
        """Drops the disk copy of a chunk that is damaged or of a version that is no longer read."""
        short = self._index.chunk_id(slot).short
        level = logging.WARNING if isinstance(error, UnsupportedVersionError) else logging.ERROR
        log.log(level, "%s drops chunk %s from its disk: %s", self._catalog.node_id, short, error)
        with self._catalog.lock:
            self._catalog.drop_disk_copy(slot)

    def _lose(self, slot: int, error: ChunkFormatError) -> NoReturn:
        self.drop(slot, error)
        raise LostChunkError(
            f"the disk of {self._catalog.node_id} does not have chunk {self._index.chunk_id(slot).short} any more: "
            f"{error}"
        )


def require_sound(index: ChunkIndex, slot: int, views: list[memoryview]) -> None:
    """Raises ChunkFormatError unless the views contain the undamaged chunk of the slot."""
    header = verify_chunk(views, index.size_bytes[slot])
    if (header.chunk_id, header.encoding.name) != (index.chunk_id(slot), index.encoding(slot)):
        raise ForeignChunkError("another chunk is stored in its place")
