"""The interface of an eviction policy."""

from abc import ABC, abstractmethod
from collections.abc import Iterator


class EvictionPolicy(ABC):
    """Orders the slots that were added to it by their value. It proposes victims, and removes no slot by itself.

    Called with the storage node's lock held: no method may block. Every method takes a time independent of the number
    of chunks, except for the amortised growth of columns. A slot is a small number that is reused after its removal.
    State is in columns that grow with the largest slot.
    """

    @abstractmethod
    def add(self, slot: int, *, identity: int, size_bytes: int, cost: float) -> None:
        """Adds a chunk that came into the tier. `identity` is a uniformly distributed 64-bit key that is the same when
        the chunk is stored again after its eviction. `cost` > 0 is the cost of recomputing the chunk, in a unit that
        all chunks share. It should not grow along a prompt, although the work of recomputing does, because a late chunk
        is worth nothing without the chunks before it."""

    @abstractmethod
    def touch(self, slot: int) -> None:
        """Records a use of the chunk by a lookup or read. The caller touches the chunks of one prompt last chunk
        first."""

    @abstractmethod
    def follow(self, slot: int, before: int) -> None:
        """Moves `slot`, which was just added or touched, so that it is proposed just before `before`, as far as the
        policy allows. `before` precedes it in the text, and `slot` is worth nothing without it."""

    @abstractmethod
    def postpone(self, slot: int) -> None:
        """Moves a proposed chunk that must stay behind other chunks of the same value. This is not a use of the
        chunk."""

    def report(self, slot: int, score: float) -> None:  # noqa: B027 (most policies have no use for it)
        """Records the share of attention, 0 to 1, that a client's model paid to a chunk that it has just used."""

    @abstractmethod
    def remove(self, slot: int, *, evicted: bool) -> None:
        """Removes a chunk that left the tier. `evicted` means that it was evicted for room and may be requested again;
        otherwise it was deleted, expired or moved."""

    @abstractmethod
    def victims(self) -> Iterator[int]:
        """Yields every slot once, best victim first. The order is computed lazily. The caller skips slots that it must
        keep, and must call no other method until it has dropped the iterator."""

    @abstractmethod
    def __len__(self) -> int: ...
