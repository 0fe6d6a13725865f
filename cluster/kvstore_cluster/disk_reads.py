"""Reading chunks back from a node's disk: what comes is verified, and what cannot be read is told from what is lost."""

import logging
from bisect import bisect_left
from collections.abc import Callable
from threading import Condition
from typing import NoReturn

from cachetools import LRUCache

from kvstore_cluster.disk import Location, SegmentStore
from kvstore_cluster.index import NOWHERE, ChunkIndex
from kvstore_cluster.stats import NodeCounters
from kvstore_codec.chunk import read_header, verify_chunk
from kvstore_codec.errors import (
    ChunkFormatError,
    ChunkNotFoundError,
    DiskError,
    ForeignChunkError,
    UnsupportedVersionError,
)

log = logging.getLogger(__name__)

# Headers of chunks that are on disk only: what lookups answer with.
HEADER_CACHE_BYTES = 32 << 20


class LostChunkError(ChunkNotFoundError):
    """Its copy on the disk has been dropped: it is damaged, or of a format version that is not read any more."""


class UnreadableChunkError(ChunkNotFoundError):
    """The disk failed to read it, also when asked again. The copy stays: the next read may succeed."""


class DiskReads:
    """Reads chunks that the caller holds, without the lock. `give_up` is called with the lock for a slot whose copy on
    the disk is lost, and drops that copy."""

    def __init__(
        self,
        node_id: str,
        store: SegmentStore | None,
        index: ChunkIndex,
        lock: Condition,
        counters: NodeCounters,
        give_up: Callable[[int], None],
    ) -> None:
        self._node_id = node_id
        self._store = store
        self._index = index
        self._lock = lock
        self._counters = counters
        self._give_up = give_up
        self._headers: LRUCache[int, bytes] = LRUCache(HEADER_CACHE_BYTES, len)
        self.unreadable: set[int] = set()
        """Slots of which the last read failed."""

    def known_header(self, slot: int) -> bytes | None:
        """Its header, if that was read lately; the caller has the lock."""
        return self._headers.get(slot)

    def forget(self, slot: int) -> None:
        """The slot's copy on the disk has gone; the caller has the lock."""
        self._headers.pop(slot, None)
        self.unreadable.discard(slot)

    def header(self, slot: int) -> bytes:
        """Raises ChunkNotFoundError when the chunk has gone meanwhile, is lost or unreadable."""
        buffer = bytearray(self._index.header_bytes[slot])
        self._read(slot, 0, [memoryview(buffer)])
        header = bytes(buffer)
        try:
            read_header(header)
        except ChunkFormatError as error:
            self._lose(slot, error)
        with self._lock:
            if self._index.listed(slot) and len(header) <= HEADER_CACHE_BYTES:
                self._headers[slot] = header
        return header

    def chunk(self, slot: int, views: list[memoryview]) -> None:
        """Fills the views with the whole chunk. Raises ChunkNotFoundError as `header`."""
        self._read(slot, 0, views)
        try:
            require_sound(self._index, slot, views)
        except ChunkFormatError as error:
            self._lose(slot, error)

    def frames(self, slot: int, offset: int, length: int, header: Callable[[], bytes]) -> memoryview:
        """Bytes of a chunk from `offset` on, whole frames or all of it; `header` gives that of the chunk. Raises
        ChunkNotFoundError as `header`."""
        data = memoryview(bytearray(length))
        if offset == 0:
            self.chunk(slot, [data])
            return data
        self._read(slot, offset, [data])
        says = read_header(header())
        first = bisect_left(range(len(says.frame_lengths)), offset, key=says.frame_offset)
        position = 0
        try:
            while position < length:
                end = position + says.frame_lengths[first]
                says.verify_frame(first, data[position:end])
                first, position = first + 1, end
        except ChunkFormatError as error:
            self._lose(slot, error)
        return data

    def _read(self, slot: int, offset: int, views: list[memoryview]) -> None:
        """Compaction may move the record meanwhile."""
        short = self._index.chunk_id(slot).short
        location = NOWHERE
        while True:
            with self._lock:
                previous, location = location, Location(self._index.location[slot])
            if location in (NOWHERE, previous) or self._store is None:
                raise ChunkNotFoundError(f"chunk {short} has left {self._node_id}")
            try:
                self._store.read(location, offset, views)
            except ChunkNotFoundError:
                continue
            except ChunkFormatError as error:
                self._lose(slot, error)
            except DiskError as error:
                log.warning("%s cannot read chunk %s from its disk: %s", self._node_id, short, error)
                with self._lock:
                    self._counters.disk_read_errors += 1
                    if self._index.listed(slot):
                        self.unreadable.add(slot)
                raise UnreadableChunkError(
                    f"the disk of {self._node_id} cannot read chunk {short} now: {error}"
                ) from error
            if slot in self.unreadable:
                with self._lock:
                    self.unreadable.discard(slot)
            return

    def _lose(self, slot: int, error: ChunkFormatError) -> NoReturn:
        short = self._index.chunk_id(slot).short
        level = logging.WARNING if isinstance(error, UnsupportedVersionError) else logging.ERROR
        log.log(level, "%s drops chunk %s from its disk: %s", self._node_id, short, error)
        with self._lock:
            self._give_up(slot)
        raise LostChunkError(f"the disk of {self._node_id} does not have chunk {short} any more: {error}")


def require_sound(index: ChunkIndex, slot: int, views: list[memoryview]) -> None:
    """Raises ChunkFormatError unless the views hold the slot's chunk."""
    header = verify_chunk(views, index.size_bytes[slot])
    if (header.chunk_id, header.encoding.name) != (index.chunk_id(slot), index.encoding(slot)):
        raise ForeignChunkError("another chunk lies in its place")
