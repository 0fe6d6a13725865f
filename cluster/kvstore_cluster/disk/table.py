"""All segments of a store, and the books about them."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from kvstore_cluster.disk.file import disk_error
from kvstore_cluster.disk.folder import StoreFolder
from kvstore_cluster.disk.location import Location, block_of, segment_of
from kvstore_cluster.disk.segment import Segment
from kvstore_codec.errors import StorageError

# How often the disk is asked how much it has left while records are being written.
_MEASUREMENTS = 3


class SegmentTable:
    """Thread-safe. `lock` guards the books of all segments and is never held over I/O."""

    def __init__(self, folder: StoreFolder) -> None:
        self.folder = folder
        self.lock = threading.Lock()
        # Until the disk has the room of a segment back that the books do not count any more.
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
        """(blocks written, bytes the disk has left at that time; None where the file system does not say). None while
        a segment is being removed. Raises OSError."""
        if not self._removing.acquire(blocking=False):  # that may take a while, and others wait to be synced
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
        """Segments whose files somebody has removed since the last call. They count as failed from now on: what lives
        in them is to be moved, and nothing of it is durable."""
        with self._removing:  # or one that is being dropped would look like one
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
        """Of live records in removed files."""
        with self.lock:
            return sum(segment.live_blocks for segment in self.segments.values() if segment.removed)

    def is_live(self, location: Location) -> bool:
        """Whether a live record or a tombstone lies there. To be called with the lock held."""
        segment = self.segments.get(segment_of(location))
        return segment is not None and segment.is_live(block_of(location))

    def mark_dead(self, location: Location) -> None:
        """The record is dead. Does nothing when it is already."""
        with self.lock:
            segment = self.segments.get(segment_of(location))
            if segment is not None:
                self.live_blocks -= segment.mark_dead(block_of(location))

    @contextmanager
    def reading(self, location: Location) -> Iterator[tuple[Segment, int] | None]:
        """The segment of a live record, whose file stays open meanwhile, and how many blocks the record has; None when
        there is no such record."""
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
        """Removes a sealed or failed segment with its file. Raises DiskError."""
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
        """As `used_blocks`, without the room of what is not written yet: indices, and records under way."""
        with self.lock:
            return self.used_blocks - sum(
                segment.index_blocks + segment.pending_blocks
                for segment in self.segments.values()
                if not segment.sealed
            )

    def close(self) -> None:
        """Forgets all segments and closes their files, those that are being read once they are not."""
        with self.lock:
            segments = list(self.segments.values())
            self.segments.clear()
            self.used_blocks = self.live_blocks = 0
            unread = [segment for segment in segments if not segment.readers]
        for segment in unread:
            segment.file.close()

    def check_integrity(self) -> None:
        """Raises StorageError unless the books agree."""
        with self.lock:
            for segment in self.segments.values():
                segment.check_integrity()
            live_blocks = sum(segment.live_blocks for segment in self.segments.values())
            used_blocks = sum(segment.used_blocks for segment in self.segments.values())
            if (live_blocks, used_blocks) != (self.live_blocks, self.used_blocks):
                raise StorageError(
                    f"{self.folder.path}: {live_blocks} live and {used_blocks} used blocks in the segments, "
                    f"{self.live_blocks} and {self.used_blocks} in the books"
                )
