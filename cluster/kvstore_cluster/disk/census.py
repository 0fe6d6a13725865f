"""Decides which of the records found at recovery are live."""

import secrets
from array import array
from collections.abc import Iterator

import numpy as np

from kvstore_cluster.disk.layout import RecordLayout
from kvstore_cluster.disk.location import BLOCK_BITS, MAX_SEGMENT_BLOCKS, Location
from kvstore_cluster.disk.record import Kind, record_blocks, summary
from kvstore_cluster.disk.segment import Column, State

_LOW = (1 << 64) - 1


class Census:
    """Columns of the record fields that decide whether a record is live. 38 bytes per record, and twice as many with
    `was_shared`: then chunks of different tenants with the same id and encoding were one chunk until now."""

    def __init__(self, *, isolated: bool = False, was_shared: bool = False) -> None:
        self._isolated = isolated
        self._shared = Census() if was_shared else None
        self._key_seed = secrets.randbits(64)
        self._high = array("Q")
        self._low = array("Q")
        self._sequences = array("Q")
        self._tombstones = array("B")
        self._hidden = array("B")
        self._locations = array("q")
        self._blocks = array("I")

    def add(
        self, location: Location, header: memoryview, layout: RecordLayout, *, hidden: bool = False
    ) -> bool:
        """Adds a record with a sound header, of a segment with this layout. Returns whether it is a tombstone. A
        `hidden` put is never live."""
        kind, sequence, size_bytes, key = summary(header, self._key_seed, with_tenant=self._isolated)
        tombstone = kind == Kind.TOMBSTONE
        self._high.append(key >> 64)
        self._low.append(key & _LOW)
        self._sequences.append(sequence)
        self._tombstones.append(tombstone)
        self._hidden.append(hidden)
        self._locations.append(location)
        self._blocks.append(record_blocks(kind, size_bytes, layout.data_blocks))
        if self._shared is not None:
            self._shared.add(location, header, layout, hidden=hidden)
        return tombstone

    def superseded(self) -> list[Location]:
        """Locations of the records that are live, but were not when they were written: the chunk of another tenant had
        replaced them, or was deleted in their place."""
        if self._shared is None:
            return []
        live = self._states() == State.LIVE
        stale = np.flatnonzero(live & (self._shared._states() != State.LIVE))
        return [Location(self._locations[record]) for record in stale]

    @property
    def newest_sequence(self) -> int:
        return max(self._sequences, default=0)

    def books(self) -> Iterator[tuple[int, Column, Column, Column]]:
        """Yields (segment number, first blocks, blocks, states) of every segment with records, in the order of
        blocks."""
        states, locations = self._states(), np.array(self._locations)
        by_location = np.argsort(locations)
        blocks, numbers = np.array(self._blocks), locations >> BLOCK_BITS
        for records in np.split(by_location, np.flatnonzero(np.diff(numbers[by_location])) + 1):
            if len(records):
                first_blocks = locations[records] & (MAX_SEGMENT_BLOCKS - 1)
                yield int(numbers[records[0]]), first_blocks, blocks[records], states[records]

    def _states(self) -> Column:
        """The state of each record.

        Records of one key are ordered by sequence number. The last record of a key is live if it is a put and not
        hidden. A tombstone comes after the put with the same number. The last tombstone of a key is kept while a put
        precedes it.
        """
        high, low, sequences, locations = (
            np.array(column) for column in (self._high, self._low, self._sequences, self._locations)
        )
        tombstones, hidden = np.array(self._tombstones, bool), np.array(self._hidden, bool)
        order = np.lexsort((locations, tombstones, sequences, low, high))
        high, low, tombstones = high[order], low[order], tombstones[order]
        starts = np.ones(len(order), bool)
        starts[1:] = (high[1:] != high[:-1]) | (low[1:] != low[:-1])
        ends = np.roll(starts, -1)
        group = np.cumsum(starts) - 1
        puts_before = np.cumsum(~tombstones) - ~tombstones
        puts_before = puts_before - puts_before[starts][group]
        last_tombstones = np.flatnonzero(tombstones)
        last_tombstones = last_tombstones[np.diff(group[last_tombstones], append=len(order)) > 0]
        states: Column = np.full(len(order), State.DEAD, np.uint8)
        states[order[ends & ~tombstones & ~hidden[order]]] = State.LIVE
        states[order[last_tombstones[puts_before[last_tombstones] > 0]]] = State.TOMBSTONE
        return states
