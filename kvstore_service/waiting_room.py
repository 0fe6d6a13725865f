"""Places for those who have not yet sent what they must send first: a credential, or the request of a call."""

from collections import OrderedDict
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

Visitor = TypeVar("Visitor", bound=Hashable)


class WaitingRoom(Generic[Visitor]):
    """Connections or calls that wait for their client, at most `most`. One more takes the place of another, the oldest
    one of the group with the most: who opens many closes their own, and whoever soon sends what is waited for gets in.
    A group is a network before a caller is known, and then its tenant. Not thread-safe."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._groups: dict[str, OrderedDict[Visitor, None]] = {}
        self._group: dict[Visitor, str] = {}

    def add(self, visitor: Visitor, group: str) -> Visitor | None:
        """Adds a connection or call of `group`. Returns the one that the caller must end for it."""
        out = None
        if len(self._group) >= self._most:
            crowd = max(self._groups.values(), key=len)
            out = next(iter(crowd))
            self.remove(out)
        self._groups.setdefault(group, OrderedDict())[visitor] = None
        self._group[visitor] = group
        return out

    def remove(self, visitor: Visitor) -> None:
        """Removes one that need not wait any longer, or has ended. Does nothing if it is not there."""
        group = self._group.pop(visitor, None)
        if group is None:
            return
        crowd = self._groups[group]
        del crowd[visitor]
        if not crowd:
            del self._groups[group]

    def __iter__(self) -> Iterator[Visitor]:
        """The oldest first."""
        return iter(self._group)

    def __contains__(self, visitor: Visitor) -> bool:
        return visitor in self._group

    def __len__(self) -> int:
        return len(self._group)
