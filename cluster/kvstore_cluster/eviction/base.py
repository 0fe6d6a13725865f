"""What the tiers ask of an eviction policy."""

from abc import ABC, abstractmethod
from collections.abc import Iterator


class EvictionPolicy(ABC):
    """Keeps an order over the slots it was told about; removes none by itself.

    Called under the storage node's lock: nothing may block, and nothing may take longer with more chunks, but for the
    growing of columns, which is amortised. A slot is a small number that comes again after its removal; state lies in
    columns that grow with the largest slot.
    """

    @abstractmethod
    def add(self, slot: int, *, identity: int, size_bytes: int, cost: float) -> None:
        """A chunk came into the tier. `identity`: 64 bits that are the same when it comes again after its eviction,
        evenly spread; `cost` of computing it again, > 0, in any unit that all chunks share. It should not grow along a
        prompt, although the computing does: what comes late is worth nothing without what comes before it."""

    @abstractmethod
    def touch(self, slot: int) -> None:
        """The chunk was found by a lookup or read. Those of one prompt are touched last chunk first."""

    @abstractmethod
    def follow(self, slot: int, before: int) -> None:
        """`slot`, which was just added or touched, stands behind `before` in their text and is worth nothing without
        it: propose it just before that one, as far as the order allows."""

    @abstractmethod
    def postpone(self, slot: int) -> None:
        """The chunk was proposed and stays: propose it after the others of its worth. That is no use of it."""

    def report(self, slot: int, score: float) -> None:  # noqa: B027 (most policies have no use for it)
        """A client that has just used the chunk says which share of its attention, 0 to 1, went there."""

    @abstractmethod
    def remove(self, slot: int, *, evicted: bool) -> None:
        """The chunk left. `evicted`: for room, as proposed here, so that it may be missed; else deleted or moved."""

    @abstractmethod
    def victims(self) -> Iterator[int]:
        """Every slot once, best victim first, found as they are asked for. The caller passes over those that it must
        keep, and calls nothing else here before it has dropped the iterator."""

    @abstractmethod
    def __len__(self) -> int: ...
