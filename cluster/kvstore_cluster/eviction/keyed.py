"""Which chunk goes first when room is needed."""

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


class EvictionPolicy(ABC, Generic[K]):
    """Keeps an order over the keys it was told about. Called under the storage node's lock, so no method may
    block; it never removes a key by itself."""

    @abstractmethod
    def add(self, key: K) -> None:
        """A chunk became visible."""

    @abstractmethod
    def touch(self, key: K) -> None:
        """A chunk was found by a lookup or read. The key is known."""

    @abstractmethod
    def remove(self, key: K) -> None:
        """A chunk was evicted or deleted. The key is known."""

    @abstractmethod
    def victims(self) -> Iterator[K]:
        """Every key, best victim first. The policy must not be changed while this is iterated."""

    @abstractmethod
    def __len__(self) -> int: ...


class LeastRecentlyUsed(EvictionPolicy[K]):
    def __init__(self) -> None:
        self._order: OrderedDict[K, None] = OrderedDict()

    def add(self, key: K) -> None:
        self._order[key] = None

    def touch(self, key: K) -> None:
        self._order.move_to_end(key)

    def remove(self, key: K) -> None:
        del self._order[key]

    def victims(self) -> Iterator[K]:
        return iter(self._order)

    def __len__(self) -> int:
        return len(self._order)
