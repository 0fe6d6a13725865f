"""The table of all segments of a store, and their total sizes."""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from kvstore_cluster.disk.file import disk_error
from kvstore_cluster.disk.folder import StoreFolder
from kvstore_cluster.disk.location import Location, block_of, segment_of
from kvstore_cluster.disk.segment import Segment
from kvstore_codec.errors import StorageError

# Attempts to measure the free space while no record is being written.
_MEASUREMENTS = 3


class SegmentTable:
    """Thread-safe. `lock` guards the metadata of all segments and is never held during I/O."""

    def __init__(self, folder: StoreFolder) -> None:
        self.folder = folder
        self.lock = threading.Lock()
        # Held while a segment is removed, until the disk and `used_blocks` agree about its space.
        self._removing = threading.Lock()
        self.segments: dict[int, Segment] = {}
        self.used_blocks = 0
        self.live_blocks = 0

    def add(self, segment: Segment) -> None:
        with self.lock:
            self.segments[segment.number] = segment
            self.used_blocks += segment.used_blocks
            self.live_blocks += segment.live_blocks

    def measure(self) -> tuple[int, int | None] | None:
        """(blocks written, free bytes on the disk at that time). The free bytes are None when the file system does not
        report them. Returns None while a segment is being removed. Raises OSError."""
        if not self._removing.acquire(blocking=False):  # a removal may be slow, and the caller must also sync
            return None
        try:
            for _ in range(_MEASUREMENTS):
                before = self._written_blocks()
                free_bytes = self.folder.free_bytes()
                after = self._written_blocks()
                if before == after:
                    break
            return min(before, after), free_bytes
        finally:
            self._removing.release()

    def take_removed(self) -> list[Segment]:
        """Returns segments whose files were removed since the last call, and marks them as failed: their live records
        are not durable, and compaction must copy them."""
        with self._removing:  # a segment that is being dropped must not count as removed
            with self.lock:
                named = [segment for segment in self.segments.values() if not segment.removed]
            found = [segment for segment in named if not self.folder.names(segment.number, segment.file)]
            with self.lock:
                for segment in found:
                    segment.removed = segment.given_up = segment.closed = True
                    segment.sealed = False
            return found

    @property
    def homeless_blocks(self) -> int:
        """Blocks of live records whose segment files were removed."""
        with self.lock:
            return sum(segment.live_blocks for segment in self.segments.values() if segment.removed)

    def chunks_by_key(self) -> dict[str, int]:
        """Number of live chunks by the id of the key of their segments."""
        chunks: Counter[str] = Counter()
        with self.lock:
            for segment in self.segments.values():
                chunks[segment.layout.key_name] += segment.live_chunks
        return dict(chunks)

    def is_live(self, location: Location) -> bool:
        """Whether a live record or a tombstone is at this location. Call with `lock` held."""
        segment = self.segments.get(segment_of(location))
        return segment is not None and segment.is_live(block_of(location))

    def mark_dead(self, location: Location) -> None:
        """Marks a record as dead. Does nothing when it is already dead."""
        with self.lock:
            segment = self.segments.get(segment_of(location))
            if segment is not None:
                self.live_blocks -= segment.mark_dead(block_of(location))

    @contextmanager
    def reading(self, location: Location) -> Iterator[tuple[Segment, int] | None]:
        """Yields (segment, number of blocks) of a live record, or None when there is none. Keeps the segment's file
        open until the `with` block ends."""
        with self.lock:
            segment = self.segments.get(segment_of(location))
            blocks = segment.blocks_at(block_of(location)) if segment is not None else 0
            if segment is not None:
                segment.readers += 1
        try:
            yield (segment, blocks) if segment is not None and blocks else None
        finally:
            if segment is not None:
                with self.lock:
                    segment.readers -= 1
                    forgotten = not segment.readers and self.segments.get(segment.number) is not segment
                if forgotten:
                    segment.file.close()

    def drop(self, segment: Segment) -> None:
        """Removes a sealed or failed segment and its file. May block. Raises DiskError."""
        with self._removing:
            try:
                self.folder.remove(segment.number)
            except OSError as error:
                raise disk_error(error, f"removing segment {segment.number} in {self.folder.path}") from error
            with self.lock:
                del self.segments[segment.number]
                self.used_blocks -= segment.used_blocks
                self.live_blocks -= segment.live_blocks
                unread = not segment.readers
            if unread:
                segment.file.close()

    def _written_blocks(self) -> int:
        """`used_blocks` without reserved blocks that are not written yet: indexes and pending records."""
        with self.lock:
            return self.used_blocks - sum(
                segment.index_blocks + segment.pending_blocks
                for segment in self.segments.values()
                if not segment.sealed
            )

    def close(self) -> None:
        """Removes all segments from the table and closes their files. A file that is being read is closed after the
        read."""
        with self.lock:
            segments = list(self.segments.values())
            self.segments.clear()
            self.used_blocks = self.live_blocks = 0
            unread = [segment for segment in segments if not segment.readers]
        for segment in unread:
            segment.file.close()

    def check_integrity(self) -> None:
        """Raises StorageError unless the metadata of all segments and the totals are consistent."""
        with self.lock:
            for segment in self.segments.values():
                segment.check_integrity()
            live_blocks = sum(segment.live_blocks for segment in self.segments.values())
            used_blocks = sum(segment.used_blocks for segment in self.segments.values())
            if (live_blocks, used_blocks) != (self.live_blocks, self.used_blocks):
                raise StorageError(
                    f"{self.folder.path}: {live_blocks} live and {used_blocks} used blocks in the segments, "
                    f"{self.live_blocks} and {self.used_blocks} in the totals"
                )
