"""Which chunk goes first when room is needed."""

# Until the policies are here: the least recently used goes first.
from collections import OrderedDict
from collections.abc import Iterator


class EvictionPolicy:
    def __init__(self) -> None:
        self._order: OrderedDict[int, None] = OrderedDict()

    def add(self, slot: int, *, identity: int, size_bytes: int, cost: float) -> None:
        self._order[slot] = None

    def touch(self, slot: int) -> None:
        self._order.move_to_end(slot)

    def report(self, slot: int, score: float) -> None: ...

    def remove(self, slot: int, *, evicted: bool) -> None:
        del self._order[slot]

    def victims(self) -> Iterator[int]:
        return iter(self._order)

    def __len__(self) -> int:
        return len(self._order)


POLICIES = {"lru": EvictionPolicy}
DEFAULT_POLICY = "lru"
