"""The log that records are appended to: all segments, the one that takes records now, and what happens when the disk
does not take them."""

import logging
import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from kvstore_cluster.disk.file import SegmentFile, disk_error
from kvstore_cluster.disk.folder import StoreFolder
from kvstore_cluster.disk.location import Location, block_of, location_of, segment_of
from kvstore_cluster.disk.record import BLOCK_BYTES, Kind, RecordHeader, RecordMeta, blocks_of
from kvstore_cluster.disk.segment import Segment, State
from kvstore_cluster.disk.segment_format import first_block
from kvstore_cluster.durable import sync_folder
from kvstore_codec.errors import ChunkNotFoundError, DiskError, DiskFullError, StorageError

log = logging.getLogger(__name__)


class OpenFile(Protocol):
    def __call__(self, path: Path, *, create: bool, direct: bool) -> SegmentFile: ...


class SegmentLog:
    """Thread-safe. `lock` guards the books and is never held over I/O; `_turn` is held by who makes room for a
    record, and while a new segment begins.

    `error` is why nothing can be appended: a write or a sync failed. A segment in which that happened is closed for
    good; `revive` clears the error once another one could be begun and synced.
    """

    def __init__(
        self,
        folder: StoreFolder,
        limit_bytes: int,
        segment_bytes: int,
        open_file: OpenFile,
        wake: Callable[[], None],
    ) -> None:
        self.folder = folder
        self.segment_bytes = segment_bytes
        self.put_limit_bytes = limit_bytes - segment_bytes
        self._limit_bytes = limit_bytes
        self.open_file = open_file
        self.lock = threading.Lock()
        self.segments: dict[int, Segment] = {}
        self.used_blocks = 0
        self.live_blocks = 0
        self.error: DiskError | None = None
        self._wake = wake
        self._turn = threading.Lock()
        self._sealing = (
            threading.Lock()
        )  # taken by upkeep and by compaction, which must not drop a half-written index
        self._written = threading.Condition(self.lock)
        self._active: Segment | None = None
        self._next_number = 1
        self._next_sequence = 1

    def adopt(self, segment: Segment, newest_sequence: int) -> None:
        """Enters a segment that was found."""
        self.segments[segment.number] = segment
        self.used_blocks += _used_blocks(segment)
        self.live_blocks += segment.live_blocks
        self._next_number = max(self._next_number, segment.number + 1)
        self._next_sequence = max(self._next_sequence, newest_sequence + 1)

    def append(self, meta: RecordMeta, views: Sequence[memoryview], *, sync: bool) -> Location:
        """Writes a new record; with `sync`, returns once it would survive a power loss. Raises DiskError, and
        StorageError for a description that is too long."""
        header = RecordHeader(Kind.PUT, self._take_sequence(), meta)
        segment, location = self._write(header, views, self.put_limit_bytes)
        if sync:
            try:
                self.sync(segment)
            except DiskError:
                self.bury(location)
                raise
        return location

    @property
    def newest_sequence(self) -> int:
        """Of all records so far."""
        with self.lock:
            return self._next_sequence - 1

    def append_tombstone(self, deleted: RecordHeader) -> None:
        """Deletes a record, which is buried already, and the older ones of its chunk and encoding for good. Raises
        DiskError."""
        header = RecordHeader(Kind.TOMBSTONE, deleted.sequence, deleted.meta)
        self._write(header, (), self._limit_bytes)

    def copy(self, original: Location, header: RecordHeader, views: Sequence[memoryview]) -> Location:
        """Writes a record once more. Raises ChunkNotFoundError when it is dead by now, DiskError."""
        _, location = self._write(header, views, self._limit_bytes, original)
        return location

    def bury(self, location: Location) -> None:
        """The record is dead. Does nothing when it is already."""
        with self.lock:
            segment = self.segments.get(segment_of(location))
            if segment is not None:
                self.live_blocks -= segment.bury(block_of(location))

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

    def sync(self, segment: Segment) -> None:
        """Returns once what was written to the segment would survive a power loss. Raises DiskError."""
        try:
            segment.commit.sync()
        except DiskError as failure:
            self._fail(segment, failure)
            raise

    def sync_all(self) -> None:
        """As `sync`, of everything. Raises DiskError, also when a failed segment still holds live records."""
        with self.lock:
            segments = [segment for segment in self.segments.values() if not segment.sealed]
        for segment in segments:
            if segment.live_blocks or not segment.given_up:
                self.sync(segment)

    def sync_written(self) -> None:
        """Syncs what was written since the last time. Raises DiskError."""
        with self.lock:
            written = [
                segment
                for segment in self.segments.values()
                if not segment.sealed and not segment.given_up and segment.commit.unsynced
            ]
        for segment in written:
            self.sync(segment)

    def seal_closed(self) -> None:
        """Seals what takes no more records. Raises DiskError."""
        with self.lock:
            waiting = [segment for segment in self.segments.values() if segment.closed and not segment.sealed]
        for segment in waiting:
            if not segment.given_up:
                self.seal(segment)

    def seal(self, segment: Segment) -> None:
        """Syncs a closed segment once its last record is written, and writes its index. Raises DiskError."""
        with self._written:
            self._written.wait_for(lambda: not segment.writing)
        self.sync(segment)
        with self._sealing:
            if segment.sealed:
                return
            with self.lock:
                segment.sealed = True
            self.write_index(segment)
            with self.lock:
                self.used_blocks += blocks_of(segment.index_bytes)
                segment.index = None

    def write_index(self, segment: Segment) -> None:
        """Tries to write the segment's index to a file; it stays in memory where that fails."""
        if segment.index is None:
            return
        path, size_bytes = self.folder.index(segment.number), segment.file.size_bytes()
        try:
            segment.index.write(path, segment.number, segment.seed, size_bytes)
        except OSError as error:
            log.warning("%s cannot be written, the next start reads all of the segment: %s", path, error)
            return
        segment.index_bytes, segment.index = segment.index.file_bytes, None

    def close_active(self) -> None:
        """The next record begins a new segment."""
        with self._turn:
            self._close_active()

    def revive(self) -> None:
        """Tries whether the disk takes writes again, if it did not. Raises DiskError."""
        with self._turn:
            if self.error is not None:
                self._begin_segment()
                log.info("the disk tier in %s takes chunks again", self.folder.path)
                self.error = None

    def drop(self, segment: Segment) -> None:
        """Removes a sealed or failed segment with its file. Raises DiskError."""
        try:
            self.folder.remove(segment.number)
        except OSError as error:
            raise disk_error(error, f"removing segment {segment.number} in {self.folder.path}") from error
        with self.lock:
            del self.segments[segment.number]
            self.used_blocks -= _used_blocks(segment)
            self.live_blocks -= segment.live_blocks
            unread = not segment.readers
        if unread:
            segment.file.close()

    def close(self) -> None:
        """Seals everything and closes the files. Raises DiskError when something could not be synced."""
        self.close_active()
        try:
            self.seal_closed()
        finally:
            with self.lock:
                segments = list(self.segments.values())
                self.segments.clear()
                self.used_blocks = self.live_blocks = 0
            for segment in segments:
                if not segment.readers:
                    segment.file.close()

    def check_integrity(self) -> None:
        """Raises StorageError unless the books agree."""
        with self.lock:
            for segment in self.segments.values():
                segment.check_integrity()
            live_blocks = sum(segment.live_blocks for segment in self.segments.values())
            used_blocks = sum(map(_used_blocks, self.segments.values()))
            if (live_blocks, used_blocks) != (self.live_blocks, self.used_blocks):
                raise StorageError(
                    f"{self.folder.path}: {live_blocks} live and {used_blocks} used blocks in the segments, "
                    f"{self.live_blocks} and {self.used_blocks} in the books"
                )

    def _write(
        self,
        header: RecordHeader,
        views: Sequence[memoryview],
        limit_bytes: int,
        original: Location | None = None,
    ) -> tuple[Segment, Location]:
        put = header.kind is Kind.PUT
        blocks = 1 + blocks_of(header.meta.size_bytes) if put else 1
        with self._turn:
            segment = self._with_room(blocks, limit_bytes)
            with self.lock:
                # A tombstone's horizon rests on this: of a dead record no copy is begun any more.
                if original is not None and not self._is_live(original):
                    raise ChunkNotFoundError(f"chunk {header.meta.chunk_id.short} was deleted meanwhile")
                first = segment.reserve(blocks)
                self.used_blocks += blocks
        if not put and original is None:
            header = replace(header, horizon=segment.number)
        try:
            opening = header.encode(segment.seed)
            block = memoryview(opening.ljust(BLOCK_BYTES, b"\0"))
            segment.file.write(first * BLOCK_BYTES, [block, *views])
        except BaseException as error:
            with self._written:
                self.used_blocks -= segment.abandon(first)
                self._written.notify_all()
            if not isinstance(error, OSError):
                raise
            failure = disk_error(error, f"writing segment {segment.number} in {self.folder.path}")
            if not isinstance(failure, DiskFullError):
                self._fail(segment, failure)
            raise failure from error
        segment.commit.wrote()
        with self._written:
            segment.complete(first, opening, State.LIVE if put else State.TOMBSTONE)
            segment.horizon = max(segment.horizon, header.horizon)
            self.live_blocks += blocks
            self._written.notify_all()
        return segment, location_of(segment.number, first)

    def _take_sequence(self) -> int:
        with self.lock:
            sequence = self._next_sequence
            self._next_sequence += 1
            return sequence

    def _is_live(self, location: Location) -> bool:
        """Called with the lock held."""
        segment = self.segments.get(segment_of(location))
        return segment is not None and segment.is_live(block_of(location))

    def _with_room(self, blocks: int, limit_bytes: int) -> Segment:
        """The active segment, a new one when the record does not fit any more."""
        if self.error is not None:
            raise type(self.error)(str(self.error))
        active = self._active
        begin = active is None or (
            active.end_block > 1 and (active.end_block + blocks) * BLOCK_BYTES > self.segment_bytes
        )
        if (self.used_blocks + blocks + begin) * BLOCK_BYTES > limit_bytes:
            raise DiskFullError(
                f"{blocks * BLOCK_BYTES} bytes do not fit on disk: {self.used_blocks * BLOCK_BYTES} of the "
                f"{limit_bytes} bytes that chunks may take in {self.folder.path} are used, "
                f"{self.live_blocks * BLOCK_BYTES} of them by live chunks"
            )
        if active is None or begin:
            self._close_active()
            return self._begin_segment()
        return active

    def _begin_segment(self) -> Segment:
        """Makes a segment, proves that it can be written and synced, and makes it the active one."""
        number, seed = self._next_number, secrets.randbits(64)
        path = self.folder.segment(number)
        try:
            file = self.open_file(path, create=True, direct=self.folder.direct)
            try:
                file.write(0, [memoryview(first_block(number, seed))])
                file.sync()
                sync_folder(self.folder.path)
            except OSError:
                file.close()
                path.unlink(missing_ok=True)
                raise
        except OSError as error:
            failure = disk_error(error, f"beginning segment {number} in {self.folder.path}")
            if not isinstance(failure, DiskFullError):
                self.error = failure
            raise failure from error
        segment = Segment(number, file, seed, end_block=1)
        with self.lock:
            self._next_number += 1
            self.segments[number] = segment
            self.used_blocks += 1
        self._active = segment
        return segment

    def _close_active(self) -> None:
        if self._active is not None:
            self._active.closed = True
            self._active = None
            self._wake()

    def _fail(self, segment: Segment, failure: DiskError) -> None:
        """The segment takes nothing more and nothing of it is called durable any more. Called without locks."""
        segment.commit.fail(failure)
        with self._turn:
            if not segment.given_up:
                log.error("segment %d of the disk tier is given up: %s", segment.number, failure)
                segment.given_up = segment.closed = True
                self.error = failure
                self._close_active()


def _used_blocks(segment: Segment) -> int:
    return segment.end_block + blocks_of(segment.index_bytes)
