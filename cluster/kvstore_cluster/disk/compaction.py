"""Giving the space of dead records back: the live ones of a segment are copied to the log's end, then its file goes.

A copy keeps the number of its original, so that it does not overrule a newer record. The file goes only once the
copies, and whatever else made its records dead, are synced; until then a crash finds both, which is the same as one.
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Iterable

from kvstore_cluster.disk.location import Location, location_of
from kvstore_cluster.disk.log import SegmentLog
from kvstore_cluster.disk.record import BLOCK_BYTES, Kind, RecordHeader, RecordMeta, decode, is_header
from kvstore_cluster.disk.scan import Window, chunk_damage
from kvstore_cluster.disk.segment import Segment, State
from kvstore_cluster.disk.segment_format import SegmentIndex
from kvstore_cluster.disk.table import SegmentTable
from kvstore_codec.errors import ChunkNotFoundError, DiskFullError

log = logging.getLogger(__name__)

Relocate = Callable[[RecordMeta, Location, Location], bool]
Lost = Callable[[RecordMeta, Location], None]

# A segment is worth its copying when this share of it is dead, and this one when space is short.
_DEAD_SHARE = 0.5
_DEAD_SHARE_SHORT = 0.1
# For so long a record that the disk cannot read is left alone.
_UNREADABLE_S = 60.0
# Space is short when so many segments would not fit any more.
_SHORT_SEGMENTS = 3


class Compactor:
    """One step at a time, from any thread."""

    def __init__(self, table: SegmentTable, segment_log: SegmentLog) -> None:
        self._table = table
        self._log = segment_log
        self._turn = threading.Lock()

    def step(self, relocate: Relocate, lost: Lost | None, stopping: threading.Event) -> bool:
        """Compacts the segment that gives most; True when there may be more to do. Raises DiskError."""
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
                except DiskFullError as error:  # what needs no copies may go all the same
                    full = error
        if full is not None:
            raise full
        return False

    def _compact(
        self, victim: Segment, relocate: Relocate, lost: Lost | None, stopping: threading.Event
    ) -> bool:
        """Whether the segment could go."""
        if not victim.closed:
            self._log.close_active()
        if not (victim.sealed or victim.given_up):
            self._log.seal(victim)
        if not self._move_records(victim, relocate, lost, stopping):
            return False
        # Not only the copies: a record may be dead because of a newer one that is not synced yet.
        # Of a removed segment nothing was durable, so the copies are all that has to be.
        if victim.removed:
            self._log.sync_written()
        else:
            self._log.sync_all()
        self._table.drop(victim)
        return True

    def finish(self) -> None:
        """Returns once no step is under way."""
        with self._turn:
            return

    def _victims(self) -> list[Segment]:
        """What is worth compacting, best first."""
        with self._table.lock:
            free_bytes = self._log.put_limit_bytes - self._table.used_blocks * BLOCK_BYTES
            short = free_bytes < _SHORT_SEGMENTS * self._log.segment_bytes
            least_share = _DEAD_SHARE_SHORT if short else _DEAD_SHARE
            shares = {number: self._dead_share(segment) for number, segment in self._table.segments.items()}
            # The one that takes records now is closed for it only where nothing else gives room. A failed segment
            # with live records comes before one without: until they have left it nothing can be removed.
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
        """Of its blocks those that need no copying; 2 where none may stay, 0 where none may go."""
        needed = segment.live_blocks
        if segment.tombstone_blocks and not self._needs_tombstones(segment, segment.horizon):
            needed -= segment.tombstone_blocks
        if needed and time.monotonic() < segment.unmovable_until_s:
            return 0.0
        if segment.given_up:  # what is in there may not be durable
            return 0.0 if segment.writing else 2.0
        return 1.0 - needed / max(1, segment.end_block - 1)

    def _needs_tombstones(self, segment: Segment, horizon: int) -> bool:
        """Whether something that a tombstone in the segment deletes may lie in another one, dead: only there can it
        be, because dead records are never copied."""
        return any(
            other.dead_records and other.number <= horizon
            for other in self._table.segments.values()
            if other is not segment
        )

    def _move_records(
        self, victim: Segment, relocate: Relocate, lost: Lost | None, stopping: threading.Event
    ) -> bool:
        """Whether nothing in the segment is needed any more."""
        with self._table.lock:
            remaining = victim.remaining()
        window = Window(victim.file)
        for first, blocks, state in remaining:
            if stopping.is_set():
                return False
            try:
                header, chunk, damage = self._read(victim, first, blocks, window)
            except OSError as error:
                log.warning(
                    "block %d of segment %d cannot be read and stays: %s", first, victim.number, error
                )
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
        """No step tries to move what is left in the segment before that time is over."""
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
            # When not moved, its owner has let go of the old one, or does not know it yet: that one stays until the
            # owner buries it.
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
        """(header, chunk, why the chunk is damaged) of a record; a damaged header is taken from the index. Raises
        OSError."""
        header: RecordHeader | None
        record = window.view(first * BLOCK_BYTES, blocks * BLOCK_BYTES)
        if is_header(record[:BLOCK_BYTES], victim.seed):
            header = decode(record)
        else:
            indexed = self._index_of(victim)
            header = next((decode(entry) for block, entry in indexed if block == first), None)
        if header is None:
            return None, record, "its header is damaged"
        chunk = record[BLOCK_BYTES : BLOCK_BYTES + header.meta.size_bytes]
        return header, chunk, chunk_damage(chunk, header) if header.kind is Kind.PUT else None

    def _index_of(self, victim: Segment) -> Iterable[tuple[int, memoryview]]:
        if victim.index is not None:
            return victim.index
        path = self._table.folder.index(victim.number)
        try:
            return SegmentIndex.read(path, victim.number, victim.seed, victim.file.size_bytes()) or ()
        except OSError as error:
            log.warning("%s cannot be read: %s", path, error)
            return ()
