"""One segment: its file and the metadata of its records."""

import logging
from array import array
from bisect import bisect_left
from collections.abc import Iterator
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvstore_cluster.disk.commit import GroupCommit
from kvstore_cluster.disk.file import SegmentFile
from kvstore_cluster.disk.layout import RecordLayout
from kvstore_cluster.disk.record import blocks_of
from kvstore_cluster.disk.segment_format import SegmentIndex
from kvstore_codec.errors import StorageError

log = logging.getLogger(__name__)

Column = npt.NDArray[np.integer[Any]]


class State(IntEnum):
    """State of a record. A record is `PENDING` until it is written. A tombstone is `TOMBSTONE` while it is needed."""

    PENDING = 0
    LIVE = 1
    TOMBSTONE = 2
    DEAD = 3


class Segment:
    """A segment accepts records until it is closed, and is sealed once all of them are synced. Its metadata takes 9
    bytes per record. Not thread-safe: use it with the lock of its SegmentTable held. `file` and `commit` need no
    lock."""

    def __init__(self, number: int, file: SegmentFile, layout: RecordLayout, end_block: int) -> None:
        self.number = number
        self.file = file
        self.layout = layout
        self.commit = GroupCommit(file, f"segment {number}")
        self.end_block = end_block
        self.index: SegmentIndex | None = SegmentIndex(bytearray())
        """Headers of the written records. None when the index is in a file."""
        self.index_bytes = self.index.file_bytes + layout.index_overhead_bytes
        """Size of the index file, or of the file to be written."""
        self.writing = 0
        self.readers = 0
        self.closed = False
        self.sealed = False
        self.given_up = False
        """Set when a write or sync failed: the records may not be durable."""
        self.removed = False
        """Set when the file was removed from the folder. It stays readable while open, but a restart does not find
        it."""
        self.unmovable_until_s = 0.0
        """Monotonic time until which compaction skips the segment, because a live record cannot be copied. Infinite for
        damaged records."""
        self.live_blocks = 0
        self.dead_records = 0
        self.tombstone_blocks = 0
        self.horizon = 0
        """Number of the newest segment that may hold a record that a tombstone in this segment deletes."""
        self._first = array("I")
        self._blocks = array("I")
        self._state = bytearray()

    def adopt(self, first: Column, blocks: Column, states: Column) -> None:
        """Adds the recovered records: first block, blocks and state of each, in the order of blocks."""
        self._first.frombytes(first.astype(np.uint32).tobytes())
        self._blocks.frombytes(blocks.astype(np.uint32).tobytes())
        self._state += states.astype(np.uint8).tobytes()
        tombstones = states == State.TOMBSTONE
        self.live_blocks = int(blocks[tombstones | (states == State.LIVE)].sum())
        self.tombstone_blocks = int(blocks[tombstones].sum())
        self.dead_records = int((states == State.DEAD).sum())

    @property
    def index_blocks(self) -> int:
        return blocks_of(self.index_bytes)

    @property
    def used_blocks(self) -> int:
        """Blocks of both files. Counts the index from the start, because it is written later without a check for
        room."""
        return self.end_block + self.index_blocks

    def write_index(self, path: Path) -> None:
        """Writes the index to a file, unless that is done. Keeps it in memory when the write fails. May block."""
        if self.index is None:
            return
        try:
            self.index.write(path, self.number, self.layout, self.file.size_bytes())
        except OSError as error:
            log.warning("%s cannot be written, so the next start reads the whole segment: %s", path, error)
            return
        self.index = None

    def reserve(self, blocks: int) -> int:
        """Reserves blocks for a record at the end, and returns the first. The caller must call `complete` or
        `abandon`."""
        first = self.end_block
        self._first.append(first)
        self._blocks.append(blocks)
        self._state.append(State.PENDING)
        self.end_block += blocks
        self.writing += 1
        return first

    @property
    def pending_blocks(self) -> int:
        """Blocks of records that are being written. These are among the last records."""
        found = found_blocks = 0
        for state, blocks in zip(reversed(self._state), reversed(self._blocks), strict=True):
            if found == self.writing:
                break
            if state == State.PENDING:
                found, found_blocks = found + 1, found_blocks + blocks
        return found_blocks

    def complete(self, first: int, header: bytes, state: State) -> None:
        """Marks a reserved record as written, in `state`."""
        if self.index is not None:
            self.index.add(first, header)
            self.index_bytes = self.index.file_bytes + self.layout.index_overhead_bytes
        self.writing -= 1
        self._settle(self._find(first), state)

    def abandon(self, first: int) -> int:
        """Gives up a reserved record after a failed write. Returns the number of freed blocks: 0 when another record
        follows it, and where no block may be written again."""
        self.writing -= 1
        if self._first[-1] != first or self.layout.writes_once:
            self._settle(self._find(first), State.DEAD)
            return 0
        self.end_block = self._first.pop()
        self._state.pop()
        return self._blocks.pop()

    def mark_dead(self, first: int) -> int:
        """Marks a record as dead. Returns the number of its blocks, or 0 when it was not live."""
        ordinal = self._find(first)
        if ordinal is None or self._state[ordinal] not in (State.LIVE, State.TOMBSTONE):
            return 0
        blocks = self._blocks[ordinal]
        self.live_blocks -= blocks
        self.tombstone_blocks -= blocks * (self._state[ordinal] == State.TOMBSTONE)
        self._settle(ordinal, State.DEAD)
        return blocks

    def blocks_at(self, first: int) -> int:
        """Number of blocks of the live record that begins at `first`. 0 when there is none."""
        ordinal = self._find(first)
        return 0 if ordinal is None or self._state[ordinal] != State.LIVE else self._blocks[ordinal]

    @property
    def live_chunks(self) -> int:
        """Number of live records with a chunk."""
        return self._state.count(State.LIVE)

    def is_live(self, first: int) -> bool:
        """Whether a live record or a tombstone begins at `first`."""
        ordinal = self._find(first)
        return ordinal is not None and self._state[ordinal] in (State.LIVE, State.TOMBSTONE)

    def remaining(self) -> list[tuple[int, int, State]]:
        """Every live record and tombstone, as (first block, blocks, state)."""
        return [record for record in self._records() if record[2] in (State.LIVE, State.TOMBSTONE)]

    def check_integrity(self) -> None:
        """Raises StorageError unless the counters match the records and no two records overlap."""
        end = 1
        pending = live = tombstones = dead = 0
        for first, blocks, state in self._records():
            if first < end:
                raise StorageError(f"segment {self.number}: two records overlap at block {first}")
            end = first + blocks
            pending += state == State.PENDING
            dead += state == State.DEAD
            live += blocks * (state in (State.LIVE, State.TOMBSTONE))
            tombstones += blocks * (state == State.TOMBSTONE)
        counted = (pending, live, tombstones, dead)
        if end > self.end_block or counted != (
            self.writing,
            self.live_blocks,
            self.tombstone_blocks,
            self.dead_records,
        ):
            raise StorageError(f"segment {self.number}: its records and its counts disagree")

    def _records(self) -> Iterator[tuple[int, int, State]]:
        return zip(self._first, self._blocks, map(State, self._state), strict=True)

    def _find(self, first: int) -> int | None:
        """Ordinal of the record that begins at `first`. None when there is none."""
        ordinal = bisect_left(self._first, first)
        return ordinal if ordinal < len(self._first) and self._first[ordinal] == first else None

    def _settle(self, ordinal: int | None, state: State) -> None:
        if ordinal is None:
            raise StorageError(f"segment {self.number} has no such record")
        blocks = self._blocks[ordinal]
        self._state[ordinal] = state
        if state in (State.LIVE, State.TOMBSTONE):
            self.live_blocks += blocks
            self.tombstone_blocks += blocks * (state == State.TOMBSTONE)
        elif state == State.DEAD:
            self.dead_records += 1
