"""Memory of chunks that were evicted."""

from array import array

_WAYS = 4
_FEWEST = 1 << 18
_SLACK = 1.125


class GhostTable:
    """A set-associative table of 13 bytes an entry: a full bucket forgets its oldest. It tells entries apart by 32 bits
    beside the bucket, so in a table of a million one stranger in a billion is taken for an acquaintance.

    It has 262,144 entries (3.3 MiB) at least, for a small store has most to learn from what it could not keep; where it
    forgets, prompts are remembered with holes.
    """

    def __init__(self, entries: int = _FEWEST) -> None:
        self._resize(entries)

    def reserve(self, entries: int) -> None:
        """Room for that many. Growing forgets everything, which is nothing as long as the store has never been full."""
        if entries > len(self._tags):
            self._resize(int(entries * _SLACK))

    def put(self, identity: int, stamp: int, note: int) -> None:
        """Remembers `stamp`, which grows from put to put, and `note` (0 to 255)."""
        first = self._bucket(identity)
        ways = self._stamps[first : first + _WAYS]
        place = first + ways.index(min(ways))
        self._tags[place] = identity >> 32
        self._stamps[place] = stamp + 1  # 0 says that the place is free
        self._notes[place] = note

    def take(self, identity: int) -> tuple[int, int] | None:
        """Stamp and note of the last put with this identity, once."""
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
