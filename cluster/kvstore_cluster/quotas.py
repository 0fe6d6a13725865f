"""How much each tenant has on a node, and what of it goes first when the tenant may not have more."""

from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping

from kvstore_cluster.index import ChunkIndex


class Quotas:
    """Not thread-safe: used under the storage node's lock. Only tenants with a limit cost memory per chunk."""

    def __init__(self, index: ChunkIndex) -> None:
        self._index = index
        self._limits: dict[str, int] = {}
        self._used: Counter[str] = Counter()
        self._coming: Counter[str] = Counter()
        self._oldest_first: dict[str, OrderedDict[int, None]] = {}

    def set_limits(self, limits: Mapping[str, int]) -> None:
        """Bytes a tenant may have on this node. What is above a new limit goes when the tenant puts something."""
        self._limits = dict(limits)
        self._oldest_first = {tenant: OrderedDict() for tenant in limits}
        if limits:
            for slot in self._index:
                if (order := self._order(slot)) is not None:
                    order[slot] = None

    def excess_bytes(self, tenant: str, size_bytes: int) -> int:
        """By how much the tenant would be above its limit with `size_bytes` more."""
        limit = self._limits.get(tenant)
        return 0 if limit is None else max(0, self._used[tenant] + self._coming[tenant] + size_bytes - limit)

    def reserve(self, tenant: str, size_bytes: int) -> None:
        """A put of so many bytes has begun, or, when negative, ended."""
        self._coming[tenant] += size_bytes
        if not self._coming[tenant]:
            del self._coming[tenant]

    @property
    def limited(self) -> bool:
        """Whether any tenant has a limit."""
        return bool(self._limits)

    def limit(self, tenant: str) -> int | None:
        return self._limits.get(tenant)

    def slots(self, tenant: str) -> Iterator[int]:
        """What a tenant with a limit has, longest unused first."""
        return iter(self._oldest_first[tenant])

    def add(self, slot: int) -> None:
        self._used[self._index.tenant(slot)] += self._index.size_bytes[slot]
        if (order := self._order(slot)) is not None:
            order[slot] = None

    def touch(self, slot: int) -> None:
        if (order := self._order(slot)) is not None:
            order.move_to_end(slot)

    def remove(self, slot: int) -> None:
        tenant = self._index.tenant(slot)
        self._used[tenant] -= self._index.size_bytes[slot]
        if not self._used[tenant]:
            del self._used[tenant]
        if (order := self._order(slot)) is not None:
            del order[slot]

    def _order(self, slot: int) -> OrderedDict[int, None] | None:
        return self._oldest_first.get(self._index.tenant(slot))
