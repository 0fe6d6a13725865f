"""Which of all records that were found count."""

import secrets
from array import array
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from kvstore_cluster.disk.location import Location
from kvstore_cluster.disk.record import Kind, summary
from kvstore_cluster.disk.segment import State


class Census:
    """A column for each thing that decides; 37 bytes a record."""

    def __init__(self) -> None:
        self._key_seed = secrets.randbits(64)
        self._high = array("Q")
        self._low = array("Q")
        self._sequences = array("Q")
        self._tombstones = array("B")
        self._locations = array("q")
        self._blocks = array("I")

    def add(self, location: Location, header: memoryview) -> Kind:
        """Counts a record with a sound header, and returns its kind."""
        found = summary(header, self._key_seed)
        self._high.append(found.key >> 64)
        self._low.append(found.key & (1 << 64) - 1)
        self._sequences.append(found.sequence)
        self._tombstones.append(found.kind is Kind.TOMBSTONE)
        self._locations.append(location)
        self._blocks.append(found.blocks)
        return found.kind

    @property
    def newest_sequence(self) -> int:
        return max(self._sequences, default=0)

    def states(self) -> Iterator[tuple[Location, int, State]]:
        """(location, blocks, state) of every record, in the order of the locations.

        The last record of a key, in the order of the sequence numbers, counts when it is a put. A tombstone comes
        after the put whose number it bears; the last one is kept as long as there is a put before it.
        """
        high, low, sequences, locations = (
            np.array(column) for column in (self._high, self._low, self._sequences, self._locations)
        )
        tombstones = np.array(self._tombstones, bool)
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
        states: npt.NDArray[np.uint8] = np.full(len(order), State.DEAD, np.uint8)
        states[order[ends & ~tombstones]] = State.LIVE
        states[order[last_tombstones[puts_before[last_tombstones] > 0]]] = State.TOMBSTONE
        for at in np.argsort(locations, kind="stable").tolist():
            yield Location(self._locations[at]), self._blocks[at], State(states[at])
