"""Compaction: frees the space of dead records. It copies the live records of a segment to the end of the log, and then
removes the segment's file.

A copy keeps the sequence number of its original, so that it does not override a newer record. The file is removed only
after the copies, and all newer records that replaced its records, are synced. Until then a recovery may find a record
twice, which is harmless.

After a change of keys, segments of other keys are compacted, too, one after another and with pauses.
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Iterable

from kvstore_cluster.disk.layouts import SegmentLayouts
from kvstore_cluster.disk.location import Location, location_of
from kvstore_cluster.disk.log import SegmentLog
from kvstore_cluster.disk.record import BLOCK_BYTES, Kind, RecordHeader, RecordMeta, decode
from kvstore_cluster.disk.scan import Window, sound_chunk
from kvstore_cluster.disk.segment import Segment, State
from kvstore_cluster.disk.segment_format import SegmentIndex
from kvstore_cluster.disk.table import SegmentTable
from kvstore_codec.errors import ChunkFormatError, ChunkNotFoundError, DiskFullError

log = logging.getLogger(__name__)

Relocate = Callable[[RecordMeta, Location, Location], bool]
Lost = Callable[[RecordMeta, Location], None]

# Share of dead blocks above which a segment is compacted, normally and when space is short.
_DEAD_SHARE = 0.5
_DEAD_SHARE_SHORT = 0.1
# Pause before a record that the disk cannot read is tried again.
_UNREADABLE_S = 60.0
# Pause after a segment was encrypted with another key, in times of its duration: this is not urgent, and it reads and
# writes the whole disk.
_REWRITE_PAUSES = 4
# Pause before files are encrypted with another key again, after the disk was full.
FULL_PAUSE_S = 60.0
# Space is short when fewer than this number of segments fit.
_SHORT_SEGMENTS = 3


class Compactor:
    """Compacts segments. Thread-safe: runs one step at a time."""

    def __init__(self, table: SegmentTable, segment_log: SegmentLog, layouts: SegmentLayouts) -> None:
        self._table = table
        self._log = segment_log
        self._layouts = layouts
        self._rewrite_at_s = 0.0  # monotonic time
        self._turn = threading.Lock()

    def step(self, relocate: Relocate, lost: Lost | None, stopping: threading.Event) -> bool:
        """Compacts the segment that frees most space. True when there may be more to do. May block. Raises
        DiskError."""
        full: DiskFullError | None = None
        with self._turn:
            for victim in self._victims():
                if stopping.is_set():
                    return False
                if full is not None and victim.live_blocks:
                    continue
                try:
                    if self._compact(victim, relocate, lost, stopping):
                        return True
                except DiskFullError as error:  # segments without live records need no space
                    full = error
            if full is None and self._rewrite_at_s <= time.monotonic() and not stopping.is_set():
                return self._rewrite(relocate, lost, stopping)
        if full is not None:
            raise full
        return False

    def _rewrite(self, relocate: Relocate, lost: Lost | None, stopping: threading.Event) -> bool:
        """Moves the chunks of the oldest segment that is not encrypted with the current key, if there is one. Returns
        whether its file was removed."""
        key_name = self._layouts.key_name
        with self._table.lock:
            outdated = (one for one in self._table.segments.values() if self._is_outdated(one, key_name))
            victim = next(outdated, None)
        if victim is None:
            return False
        began_s = time.monotonic()
        try:
            return self._compact(victim, relocate, lost, stopping)
        except DiskFullError as error:
            log.info("segment %d is not encrypted with the current key yet: %s", victim.number, error)
            self._rewrite_at_s = time.monotonic() + FULL_PAUSE_S
            return False
        finally:
            ended_s = time.monotonic()
            self._rewrite_at_s = max(self._rewrite_at_s, ended_s + (ended_s - began_s) * _REWRITE_PAUSES)

    def _is_outdated(self, segment: Segment, key_name: str) -> bool:
        """Whether the segment can be, and must be, encrypted with the key. Call with the table's lock held."""
        return not (
            segment.layout.key_name == key_name
            or segment.given_up
            or segment.writing
            or time.monotonic() < segment.unmovable_until_s
        )

    def _compact(
        self, victim: Segment, relocate: Relocate, lost: Lost | None, stopping: threading.Event
    ) -> bool:
        """Compacts one segment. Returns whether its file was removed."""
        if not victim.closed:
            self._log.close_active()
        if not (victim.sealed or victim.given_up):
            self._log.seal(victim)
        if not self._move_records(victim, relocate, lost, stopping):
            return False
        # Sync more than the copies: a record may be dead because of a newer one that is not synced yet. The records
        # of a removed file were not durable, so there only the copies need a sync.
        if victim.removed:
            self._log.sync_written()
        else:
            self._log.sync_all()
        self._table.drop(victim)
        return True

    def finish(self) -> None:
        """Waits until no step is running."""
        with self._turn:
            return

    def _victims(self) -> list[Segment]:
        """Segments to compact, best first."""
        with self._table.lock:
            free_bytes = self._log.put_limit_bytes - self._table.used_blocks * BLOCK_BYTES
            short = free_bytes < _SHORT_SEGMENTS * self._log.segment_bytes
            least_share = _DEAD_SHARE_SHORT if short else _DEAD_SHARE
            shares = {number: self._dead_share(segment) for number, segment in self._table.segments.items()}
            # The active segment comes last, because compaction must close it. A failed segment with live records
            # comes before one without: no file can be removed until the live records have been copied.
            return sorted(
                (
                    segment
                    for number, segment in self._table.segments.items()
                    if shares[number] > least_share and (segment.closed or short)
                ),
                key=lambda segment: (segment.closed, shares[segment.number], segment.live_blocks > 0),
                reverse=True,
            )

    def _dead_share(self, segment: Segment) -> float:
        """Share of the segment's blocks that need no copy. 2 when the segment must be compacted, 0 when it cannot
        be."""
        needed = segment.live_blocks
        if segment.tombstone_blocks and not self._needs_tombstones(segment, segment.horizon):
            needed -= segment.tombstone_blocks
        if needed and time.monotonic() < segment.unmovable_until_s:
            return 0.0
        if segment.given_up:  # its records may not be durable
            return 0.0 if segment.writing else 2.0
        return 1.0 - needed / max(1, segment.end_block - 1)

    def _needs_tombstones(self, segment: Segment, horizon: int) -> bool:
        """Whether another segment may hold a dead record that a tombstone in this segment deletes. Dead records are
        never copied, so only segments up to `horizon` may."""
        return any(
            other.dead_records and other.number <= horizon
            for other in self._table.segments.values()
            if other is not segment
        )

    def _move_records(
        self, victim: Segment, relocate: Relocate, lost: Lost | None, stopping: threading.Event
    ) -> bool:
        """Copies the live records out of the segment. Returns whether none is left."""
        with self._table.lock:
            remaining = victim.remaining()
        window = Window(victim.file)
        for first, blocks, state in remaining:
            if stopping.is_set():
                return False
            try:
                header, chunk, damage = self._read(victim, first, blocks, window)
            except OSError as error:
                log.warning("cannot read block %d of segment %d, keeping it: %s", first, victim.number, error)
                self._leave_for(victim, _UNREADABLE_S)
                continue
            old = location_of(victim.number, first)
            if header is not None and state is State.TOMBSTONE:
                self._move_tombstone(victim, old, header)
            elif header is not None and damage is None:
                self._move_chunk(old, header, chunk, relocate)
            else:
                log.error("the record at block %d of segment %d is lost: %s", first, victim.number, damage)
                if header is not None and lost is not None:
                    lost(header.meta, old)
                with self._table.lock:
                    lives = self._table.is_live(old)
                if lives:
                    self._leave_for(victim, math.inf)
        with self._table.lock:
            return not victim.live_blocks

    def _leave_for(self, victim: Segment, duration_s: float) -> None:
        """Excludes the segment from compaction for `duration_s`."""
        victim.unmovable_until_s = max(victim.unmovable_until_s, time.monotonic() + duration_s)

    def _move_chunk(self, old: Location, header: RecordHeader, chunk: memoryview, relocate: Relocate) -> None:
        try:
            new = self._log.copy(old, header, (chunk,))
        except ChunkNotFoundError:
            return
        moved = False
        try:
            moved = relocate(header.meta, old, new)
        finally:
            # When `relocate` refuses, the index has dropped the old location or does not have it yet. The old record
            # then stays until the index deletes it.
            self._table.mark_dead(old if moved else new)

    def _move_tombstone(self, victim: Segment, old: Location, header: RecordHeader) -> None:
        with self._table.lock:
            needed = self._needs_tombstones(victim, header.horizon)
        if needed:
            self._log.copy(old, header, ())
        self._table.mark_dead(old)

    def _read(
        self, victim: Segment, first: int, blocks: int, window: Window
    ) -> tuple[RecordHeader | None, memoryview, str | None]:
        """Reads a record: (header, chunk, why the chunk is damaged). Takes a damaged header from the segment's index.
        Raises OSError."""
        header: RecordHeader | None
        record = window.view(first * BLOCK_BYTES, blocks * BLOCK_BYTES)
        opening = victim.layout.header(first, record[:BLOCK_BYTES])
        if opening is not None:
            header = decode(opening)
        else:
            indexed = self._index_of(victim)
            header = next((decode(entry) for block, entry in indexed if block == first), None)
        if header is None:
            return None, record, "its header is damaged"
        if header.kind is not Kind.PUT:
            return header, record, None
        try:
            return header, sound_chunk(record, victim.layout, first, header), None
        except ChunkFormatError as error:
            return header, record, str(error)

    def _index_of(self, victim: Segment) -> Iterable[tuple[int, memoryview]]:
        if victim.index is not None:
            return victim.index
        path = self._table.folder.index(victim.number)
        try:
            return SegmentIndex.read(path, victim.number, victim.layout, victim.file.size_bytes()) or ()
        except OSError as error:
            log.warning("%s cannot be read: %s", path, error)
            return ()
