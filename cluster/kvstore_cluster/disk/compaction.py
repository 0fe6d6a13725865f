"""Giving the space of dead records back: the live ones of a segment are copied to the log's end, then its file goes.

A copy keeps the number of its original, so that it does not overrule a newer record. The file goes only once the
copies, and whatever else made its records dead, are synced; until then a crash finds both, which is the same as one.
"""

import logging
import threading
from collections.abc import Callable

from kvstore_cluster.disk.location import Location, location_of
from kvstore_cluster.disk.log import SegmentLog
from kvstore_cluster.disk.record import BLOCK_BYTES, Kind, RecordHeader, RecordMeta, decode, is_header
from kvstore_cluster.disk.scan import Window, chunk_damage
from kvstore_cluster.disk.segment import Segment, State
from kvstore_cluster.disk.table import SegmentTable
from kvstore_codec.errors import ChunkNotFoundError

log = logging.getLogger(__name__)

Relocate = Callable[[RecordMeta, Location, Location], bool]

# A segment is worth its copying when this share of it is dead, and this one when space is short.
_DEAD_SHARE = 0.5
_DEAD_SHARE_SHORT = 0.1
# Space is short when so many segments would not fit any more.
_SHORT_SEGMENTS = 3


class Compactor:
    """One step at a time, from any thread."""

    def __init__(self, table: SegmentTable, segment_log: SegmentLog) -> None:
        self._table = table
        self._log = segment_log
        self._turn = threading.Lock()

    def step(self, relocate: Relocate, stopping: threading.Event) -> bool:
        """Compacts the segment that gives most; True when there may be more to do. Raises DiskError."""
        with self._turn:
            victim = self._victim()
            if victim is None:
                return False
            if not victim.closed:
                self._log.close_active()
            if not (victim.sealed or victim.given_up):
                self._log.seal(victim)
            if not self._move_records(victim, relocate, stopping):
                return False
            # Not only the copies: a record may be dead because of a newer one that is not synced yet.
            self._log.sync_all()
            self._table.drop(victim)
            return True

    def finish(self) -> None:
        """Returns once no step is under way."""
        with self._turn:
            return

    def _victim(self) -> Segment | None:
        with self._table.lock:
            free_bytes = self._log.put_limit_bytes - self._table.used_blocks * BLOCK_BYTES
            short = free_bytes < _SHORT_SEGMENTS * self._log.segment_bytes
            least_share = _DEAD_SHARE_SHORT if short else _DEAD_SHARE
            shares = {number: self._dead_share(segment) for number, segment in self._table.segments.items()}
            worth_while = [
                segment for number, segment in self._table.segments.items() if shares[number] > least_share
            ]
            closed = [segment for segment in worth_while if segment.closed]
            # The one that takes records now is closed for it only where nothing else gives room.
            choice = closed or (worth_while if short else [])
            return max(choice, key=lambda segment: shares[segment.number], default=None)

    def _dead_share(self, segment: Segment) -> float:
        """Of its blocks those that need no copying; 2 where none may stay, 0 where none may go."""
        needed = segment.live_blocks
        if segment.tombstone_blocks and not self._needs_tombstones(segment, segment.horizon):
            needed -= segment.tombstone_blocks
        if needed and segment.unreadable:
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

    def _move_records(self, victim: Segment, relocate: Relocate, stopping: threading.Event) -> bool:
        """Whether nothing in the segment is needed any more."""
        with self._table.lock:
            remaining = victim.remaining()
        window = Window(victim.file)
        for first, blocks, state in remaining:
            if stopping.is_set():
                return False
            if state is State.TOMBSTONE:
                self._move_tombstone(victim, first, window)
            else:
                self._move_chunk(victim, first, blocks, window, relocate)
        with self._table.lock:
            return not victim.live_blocks

    def _move_chunk(
        self, victim: Segment, first: int, blocks: int, window: Window, relocate: Relocate
    ) -> None:
        old = location_of(victim.number, first)
        record = self._read(victim, first, blocks, window)
        if record is None:
            return
        header, chunk = record
        try:
            new = self._log.copy(old, header, (chunk,))
        except ChunkNotFoundError:
            return
        if relocate(header.meta, old, new):
            self._table.bury(old)
        else:
            # Its owner has let go of the old one, or does not know it yet: it stays until the owner buries it.
            self._table.bury(new)

    def _move_tombstone(self, victim: Segment, first: int, window: Window) -> None:
        record = self._read(victim, first, 1, window)
        if record is None:
            return
        header, _ = record
        old = location_of(victim.number, first)
        with self._table.lock:
            needed = self._needs_tombstones(victim, header.horizon)
        if needed:
            self._log.copy(old, header, ())
        self._table.bury(old)

    def _read(
        self, victim: Segment, first: int, blocks: int, window: Window
    ) -> tuple[RecordHeader, memoryview] | None:
        """A record; None when it is damaged, and then the segment stays until the record is deleted."""
        try:
            record = window.view(first * BLOCK_BYTES, blocks * BLOCK_BYTES)
            damage = None if is_header(record[:BLOCK_BYTES], victim.seed) else "its header is damaged"
        except OSError as error:
            damage = str(error)
        if damage is None:
            header = decode(record)
            chunk = record[BLOCK_BYTES : BLOCK_BYTES + header.meta.size_bytes]
            damage = chunk_damage(chunk, header) if header.kind is Kind.PUT else None
            if damage is None:
                return header, chunk
        log.error("the record at block %d of segment %d cannot be moved: %s", first, victim.number, damage)
        victim.unreadable = True
        return None
