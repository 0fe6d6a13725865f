"""A ghost table: remembers evicted chunks."""

from array import array

_WAYS = 4
_FEWEST = 1 << 18
_SLACK = 1.125


class GhostTable:
    """A set-associative table with 13 bytes per entry. A full bucket drops its oldest entry. An entry is identified by
    its bucket and 32 more bits of its key, so about one lookup of an unknown chunk in a billion finds a wrong entry.

    The table has at least 262,144 entries (3.3 MiB), because a small store evicts soon what it needs again. A table
    that drops entries remembers only some chunks of a prompt.
    """

    def __init__(self, entries: int = _FEWEST) -> None:
        self._resize(entries)

    def reserve(self, entries: int) -> None:
        """Makes room for `entries`. Growing clears the table. A store that was never full has no entries to lose."""
        if entries > len(self._tags):
            self._resize(int(entries * _SLACK))

    def put(self, identity: int, stamp: int, note: int) -> None:
        """Adds an entry with `stamp`, which must increase from put to put, and `note`, 0 to 255."""
        first = self._bucket(identity)
        ways = self._stamps[first : first + _WAYS]
        place = first + ways.index(min(ways))
        self._tags[place] = identity >> 32
        self._stamps[place] = stamp + 1  # 0 marks a free entry
        self._notes[place] = note

    def take(self, identity: int) -> tuple[int, int] | None:
        """Removes the entry of this identity and returns its (stamp, note). None when there is no entry."""
        first = self._bucket(identity)
        tag = identity >> 32
        for place, held in enumerate(self._tags[first : first + _WAYS], first):
            if held == tag and (stamp := self._stamps[place]):
                self._stamps[place] = 0
                return stamp - 1, self._notes[place]
        return None

    def _bucket(self, identity: int) -> int:
        return (identity & 0xFFFFFFFF) % self._buckets * _WAYS

    def _resize(self, entries: int) -> None:
        self._buckets = -(-entries // _WAYS)
        entries = self._buckets * _WAYS
        self._tags = array("I", bytes(4 * entries))
        self._stamps = array("Q", bytes(8 * entries))
        self._notes = array("B", bytes(entries))
