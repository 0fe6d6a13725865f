"""The log of records: appends to the active segment, syncs and seals segments, and handles failed writes."""

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

from kvstore_cluster.disk.file import disk_error
from kvstore_cluster.disk.layouts import SegmentLayouts
from kvstore_cluster.disk.location import Location, location_of
from kvstore_cluster.disk.record import BLOCK_BYTES, Kind, RecordHeader, RecordMeta, record_blocks
from kvstore_cluster.disk.segment import Segment, State
from kvstore_cluster.disk.table import SegmentTable
from kvstore_cluster.durable import sync_folder
from kvstore_codec.errors import ChunkNotFoundError, DiskError, DiskFullError, SegmentRemovedError

log = logging.getLogger(__name__)

# Fewest segments of a store at its limit, so that compaction has a choice.
FEWEST_SEGMENTS = 8


class SegmentLog:
    """Appends records to segments. Thread-safe; methods that write or sync may block. `_turn` is held to reserve room
    for a record and to begin a segment. `_sealing` is held to write an index.

    `error` is the failed write or sync that prevents appends, or None. The segment with the failure is closed
    permanently. `revive` clears the error once a new segment could be created and synced.

    All files together may take `room_bytes`: the limit, or the space on the disk if that is less. Puts leave a part of
    it free for tombstones and copies.
    """

    def __init__(
        self,
        table: SegmentTable,
        layouts: SegmentLayouts,
        limit_bytes: int,
        segment_bytes: int,
        wake: Callable[[], None],
    ) -> None:
        self.segment_bytes = segment_bytes
        self.limit_bytes = self.room_bytes = limit_bytes
        self.fitting_bytes = limit_bytes
        """Live bytes that fit on the disk: the limit, or less after a write found the disk full."""
        self._copy_limit_bytes = limit_bytes + segment_bytes
        self._table = table
        self._layouts = layouts
        self._folder = table.folder
        self.error: DiskError | None = None
        self._wake = wake
        self._turn = threading.Lock()
        self._sealing = threading.Lock()
        self._written = threading.Condition(table.lock)
        self._active: Segment | None = None
        self._next_number = 1
        self._next_sequence = 1

    def continue_after(self, newest_sequence: int) -> None:
        """Sets the next sequence and segment numbers above all recovered ones."""
        self._next_sequence = newest_sequence + 1
        self._next_number = max(self._table.segments, default=0) + 1
        # Tombstones, or recovered records above a lowered limit, may fill the room that puts leave free. Compaction
        # must still be able to copy one segment before it can remove one.
        largest_blocks = max((segment.end_block for segment in self._table.segments.values()), default=0)
        self._copy_limit_bytes = max(self.limit_bytes, self._table.used_blocks * BLOCK_BYTES) + max(
            self.segment_bytes, largest_blocks * BLOCK_BYTES
        )

    @property
    def put_limit_bytes(self) -> int:
        """Limit of the total size of all files after a put, bytes."""
        return self.room_bytes - self._spare(self.room_bytes)

    def measure(self) -> None:
        """Updates `room_bytes` from the free space on the disk, which other programs may use. Raises DiskError."""
        try:
            measured = self._table.measure()
        except OSError as error:
            raise disk_error(error, f"measuring {self._folder.path}") from error
        if measured is None:
            return
        used_blocks, free_bytes = measured
        self.room_bytes = self.fitting_bytes = self.limit_bytes
        if free_bytes is not None:
            self.room_bytes = min(self.limit_bytes, used_blocks * BLOCK_BYTES + free_bytes)

    def append(self, meta: RecordMeta, views: Sequence[memoryview], *, sync: bool) -> Location:
        """Writes a new record. With `sync`, syncs it, so that it survives a power loss. Raises DiskError, and
        StorageError when the names in its header are too long."""
        header = RecordHeader(Kind.PUT, self._take_sequence(), meta)
        try:
            return self._append(header, views, sync=sync)
        except SegmentRemovedError:  # the folder was removed: append to a new segment in a new folder
            self.revive()
            return self._append(header, views, sync=sync)

    @property
    def newest_sequence(self) -> int:
        """The last assigned sequence number."""
        with self._table.lock:
            return self._next_sequence - 1

    def append_tombstone(self, meta: RecordMeta, sequence: int) -> None:
        """Writes a tombstone that deletes all records of a chunk and encoding up to `sequence`. Raises DiskError."""
        self._write(RecordHeader(Kind.TOMBSTONE, sequence, meta), (), self.room_bytes)

    def copy(self, original: Location, header: RecordHeader, views: Sequence[memoryview]) -> Location:
        """Writes a copy of a live record. Raises ChunkNotFoundError when the original is dead, and DiskError."""
        _, location = self._write(header, views, self._copy_limit_bytes, original)
        return location

    def sync(self, segment: Segment) -> None:
        """Syncs the records of a segment, so that they survive a power loss. Raises DiskError."""
        try:
            segment.commit.sync()
        except DiskError as failure:
            self._fail(segment, failure)
            raise
        self._require_name(segment)

    def sync_all(self) -> None:
        """Syncs all segments. Raises DiskError, also when a failed segment still holds live records."""
        self.give_up_removed()
        with self._table.lock:
            segments = [segment for segment in self._table.segments.values() if not segment.sealed]
        for segment in segments:
            if segment.live_blocks or not segment.given_up:
                self.sync(segment)

    def sync_written(self) -> None:
        """Syncs the segments with unsynced writes, except failed ones. Raises DiskError."""
        with self._table.lock:
            written = [
                segment
                for segment in self._table.segments.values()
                if not segment.sealed and not segment.given_up and segment.commit.unsynced
            ]
        for segment in written:
            self.sync(segment)

    def give_up_removed(self) -> None:
        """Marks segments whose files were removed as failed. Compaction then copies their live records."""
        removed = self._table.take_removed()
        if not removed:
            return
        failure = SegmentRemovedError(
            f"files of the disk tier were removed from {self._folder.path} while they are in use"
        )
        for segment in removed:
            segment.commit.fail(failure)
        with self._turn:
            live_bytes = sum(segment.live_blocks for segment in removed) * BLOCK_BYTES
            log.error("%s; writing %d bytes of chunks in them again", failure, live_bytes)
            if self._active in removed:
                self._close_active()
                self.error = failure
        self._wake()

    def seal_closed(self) -> None:
        """Seals all closed segments. Raises DiskError."""
        with self._table.lock:
            waiting = [
                segment for segment in self._table.segments.values() if segment.closed and not segment.sealed
            ]
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
            segment.write_index(self._folder.index(segment.number))
            with self._table.lock:
                segment.index = None
                segment.sealed = True

    def close_active(self) -> None:
        """Closes the active segment. The next record begins a new one."""
        with self._turn:
            self._close_active()

    def revive(self) -> None:
        """After a failure, begins a new segment to test whether the disk accepts writes again. Raises DiskError."""
        with self._turn:
            if self.error is not None:
                self._begin_segment()
                log.info("the disk tier in %s takes chunks again", self._folder.path)
                self.error = None

    def _append(self, header: RecordHeader, views: Sequence[memoryview], *, sync: bool) -> Location:
        segment, location = self._write(header, views, self.put_limit_bytes)
        try:
            if sync:
                self.sync(segment)
            else:
                self._require_name(segment)
        except DiskError:
            self._table.mark_dead(location)
            raise
        return location

    def _require_name(self, segment: Segment) -> None:
        """Raises SegmentRemovedError when the segment's file was removed: its records are lost when this process
        ends."""
        if not self._folder.names(segment.number, segment.file):
            self.give_up_removed()
            raise SegmentRemovedError(
                f"segment {segment.number} was removed from {self._folder.path} while in use"
            )

    def _write(
        self,
        header: RecordHeader,
        views: Sequence[memoryview],
        limit_bytes: int,
        original: Location | None = None,
    ) -> tuple[Segment, Location]:
        put = header.kind is Kind.PUT
        blocks = record_blocks(header.kind, header.meta.size_bytes, self._layouts.data_blocks)
        with self._turn:
            segment = self._with_room(blocks, limit_bytes)
            with self._table.lock:
                # The horizon of tombstones relies on this: no copy of a dead record may begin.
                if original is not None and not self._table.is_live(original):
                    raise ChunkNotFoundError(f"chunk {header.meta.chunk_id.short} was deleted meanwhile")
                first = segment.reserve(blocks)
                self._table.used_blocks += blocks
        if not put and original is None:
            header = replace(header, horizon=segment.number)
        try:
            opening = header.encode(segment.layout.seed, segment.layout.header_room_bytes)
            segment.layout.write(segment.file, first, opening, views)
        except BaseException as error:
            with self._written:
                self._table.used_blocks -= segment.abandon(first)
                self._written.notify_all()
            if not isinstance(error, OSError):
                raise
            failure = disk_error(error, f"writing segment {segment.number} in {self._folder.path}")
            if isinstance(failure, DiskFullError):
                self._found_full()
            else:
                self._fail(segment, failure)
            raise failure from error
        segment.commit.wrote()
        with self._written:
            before = segment.used_blocks
            segment.complete(first, opening, State.LIVE if put else State.TOMBSTONE)
            self._table.used_blocks += segment.used_blocks - before
            segment.horizon = max(segment.horizon, header.horizon)
            self._table.live_blocks += blocks
            self._written.notify_all()
        return segment, location_of(segment.number, first)

    def _take_sequence(self) -> int:
        with self._table.lock:
            sequence = self._next_sequence
            self._next_sequence += 1
            return sequence

    def _with_room(self, blocks: int, limit_bytes: int) -> Segment:
        """The active segment, or a new one when the record does not fit. Raises DiskFullError."""
        if self.error is not None:
            raise type(self.error)(str(self.error))
        active = self._active
        begin = active is None or (
            active.end_block > 1
            and (
                (active.end_block + blocks) * BLOCK_BYTES > self._spare(self.room_bytes)
                or active.layout.key_name != self._layouts.key_name
            )
        )
        # A new segment takes two more blocks: its first block and one of its index.
        if (self._table.used_blocks + blocks + 2 * begin) * BLOCK_BYTES > limit_bytes:
            advice = "; free space on that disk" if self.room_bytes < self.limit_bytes else ""
            raise DiskFullError(
                f"{blocks * BLOCK_BYTES} bytes do not fit on disk: {self._table.used_blocks * BLOCK_BYTES} of the "
                f"{limit_bytes} bytes available to chunks in {self._folder.path} are used, "
                f"{self._table.live_blocks * BLOCK_BYTES} of them by live chunks{advice}"
            )
        if active is None or begin:
            self._close_active()
            return self._begin_segment()
        return active

    def _begin_segment(self) -> Segment:
        """Creates a segment, writes and syncs its first block, and makes it the active one. Raises DiskError."""
        number = self._next_number
        layout, block = self._layouts.new(number)
        path = self._folder.segment(number)
        try:
            self._folder.restore()
            file = self._folder.open_segment(number, create=True)
            try:
                file.write(0, [memoryview(block)])
                file.sync()
                sync_folder(self._folder.path)
            except OSError:
                file.close()
                path.unlink(missing_ok=True)
                raise
        except OSError as error:
            failure = disk_error(error, f"beginning segment {number} in {self._folder.path}")
            if isinstance(failure, DiskFullError):
                self._found_full()
            else:
                self.error = failure
            raise failure from error
        segment = Segment(number, file, layout, end_block=1)
        self._next_number += 1
        self._table.add(segment)
        self._active = segment
        return segment

    def _found_full(self) -> None:
        """Lowers `fitting_bytes` after a write found the disk full, so that chunks are evicted. A disk quota or other
        programs can leave less room than the measured free space."""
        live_bytes = self._table.live_blocks * BLOCK_BYTES
        self.fitting_bytes = min(self.fitting_bytes, live_bytes - self._spare(live_bytes))

    def _spare(self, size_bytes: int) -> int:
        """Bytes that puts leave free for compaction: one segment, or less when the room is small."""
        return min(self.segment_bytes, size_bytes // FEWEST_SEGMENTS)

    def _close_active(self) -> None:
        if self._active is not None:
            self._active.closed = True
            self._active = None
            self._wake()

    def _fail(self, segment: Segment, failure: DiskError) -> None:
        """Closes a segment after a failed write or sync. Its records no longer count as durable. Called without
        locks."""
        segment.commit.fail(failure)
        with self._turn:
            if not segment.given_up:
                log.error("no longer writing to segment %d of the disk tier: %s", segment.number, failure)
                segment.given_up = segment.closed = True
                self.error = failure
                self._close_active()
