"""Quotas of tenants on a node: counts the bytes of each tenant, and chooses its chunks to evict above its quota."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from itertools import chain, islice

from kvstore_cluster.eviction.columns import NO_SLOT, Links, SlotQueue
from kvstore_cluster.eviction.texts import Choice, Followers, choose
from kvstore_cluster.index import ChunkIndex
from kvstore_codec.errors import OverQuotaError, StorageError, TextTooLongError


class Quotas:
    """Bytes stored by each tenant, and a least recently used order for each tenant that has or had a limit. Chunks of
    other tenants cost no ordering work. Not thread-safe: used with the storage node's lock held."""

    def __init__(self, index: ChunkIndex) -> None:
        self._index = index
        self._limits: dict[str, int] = {}
        self._used: Counter[str] = Counter()
        self._coming: Counter[str] = Counter()
        self._links = Links()
        self._oldest_first: dict[str, SlotQueue] = {}
        self._followers = Followers(index.texts)
        self._entered = bytearray()  # whether a slot is in its tenant's order, by slot

    def begin_orders(self, tenants: Iterable[str]) -> bool:
        """Creates an order for each of these tenants that has none. True when one was created: the caller must then
        enter the chunks that are already stored with `enter_all`."""
        new = [tenant for tenant in tenants if tenant not in self._oldest_first]
        self._oldest_first.update((tenant, SlotQueue(self._links)) for tenant in new)
        return bool(new)

    def enter_all(self, begin: int, end: int) -> None:
        """Enters the slots from `begin` to `end` that were stored before their tenant had an order. They are evicted
        before chunks stored since. The caller goes from the last slot range to the first, so that lower slots are
        evicted first."""
        for slot in reversed(range(begin, end)):
            if self._index.is_linked(slot) and not self._is_entered(slot):
                order = self._oldest_first.get(self._index.tenant(slot))
                if order is not None:
                    # `choose` considers the text links, so the chunk need not follow them here.
                    self._enter(slot, order, first=True)

    def set_limits(self, limits: Mapping[str, int]) -> None:
        """Replaces the limits: the bytes that each tenant may store on this node. Every tenant in `limits` must have an
        order. Chunks above a new limit are evicted when the tenant next puts a chunk."""
        self._limits = dict(limits)
        for tenant in [tenant for tenant in self._oldest_first if tenant not in limits]:
            self._end_order(tenant)

    def excess_bytes(self, tenant: str, size_bytes: int) -> int:
        """Bytes by which the tenant would exceed its limit with `size_bytes` more. 0 without a limit."""
        limit = self._limits.get(tenant)
        return 0 if limit is None else max(0, self._used[tenant] + self._coming[tenant] + size_bytes - limit)

    def reserve(self, tenant: str, size_bytes: int) -> None:
        """Adds the size of a begun put to the tenant's reserved bytes. A negative size ends the put."""
        self._coming[tenant] += size_bytes
        if not self._coming[tenant]:
            del self._coming[tenant]

    @property
    def used_bytes(self) -> Mapping[str, int]:
        """Bytes stored, by tenant. The caller must not change the mapping."""
        return self._used

    @property
    def limits_bytes(self) -> Mapping[str, int]:
        """Bytes that each tenant with a limit may store on this node. The caller must not change the mapping."""
        return self._limits

    @property
    def limited(self) -> bool:
        """Whether any tenant has an order."""
        return bool(self._oldest_first)

    def choose(
        self, tenant: str, missing_bytes: int, may_go: Callable[[int], bool], *, spared: int = NO_SLOT
    ) -> Choice:
        """Chooses chunks to evict of a tenant that has a limit: least recently used first, and the end of a text before
        its beginning, as `texts.choose` defines."""
        order = self._oldest_first[tenant]
        choice = choose(
            order, missing_bytes, self._index.size_bytes.__getitem__, may_go, self._index.texts, self._followers,
            spared=spared,
        )  # fmt: skip
        for slot in choice.next:
            self.follow(slot)
        for slot in choice.kept:
            order.remove(slot)
            order.push(slot)
        return choice

    def refusal(self, tenant: str, node_id: str, *, own_text: bool) -> StorageError:
        """The error for a put above the tenant's limit when the chunks that `choose` found are not enough."""
        limit = self._limits[tenant]
        if own_text:
            return TextTooLongError(
                f"of the {limit} bytes that tenant {tenant!r} may store on {node_id}, only the beginning of the same "
                "text is left to evict, and it is kept. Raise the quota with `kvstore quota`"
            )
        return OverQuotaError(
            f"tenant {tenant!r} may store {limit} bytes on {node_id}, and its chunks there that are not leased, pinned "
            "or being read are too small to make room; retry later or raise the quota with `kvstore quota`"
        )

    def add(self, slot: int) -> None:
        tenant = self._index.tenant(slot)
        self._used[tenant] += self._index.size_bytes[slot]
        if (order := self._oldest_first.get(tenant)) is not None:
            self._enter(slot, order)
            self.follow(slot)

    def linked(self, slot: int) -> None:
        """Records a text link that was added after the chunk was stored."""
        if self._is_entered(slot):
            self._followers.add(slot)

    def succeed(self, slot: int, old: int) -> None:
        """Gives the followers of `old` in its text to `slot`, which is not added yet."""
        self._followers.succeed(slot, old)

    def touch(self, slot: int) -> None:
        if self._is_entered(slot):
            order = self._order(slot)
            order.remove(slot)
            order.push(slot)

    def follow(self, slot: int) -> None:
        """Moves a chunk that was just added or touched before its predecessor in the text, if both are in one order."""
        before = self._index.texts.before(slot)
        if before == NO_SLOT or not (self._is_entered(slot) and self._is_entered(before)):
            return
        order = self._order(slot)
        if self._order(before) is order:
            order.remove(slot)
            order.insert_before(slot, before)

    def remove(self, slot: int) -> None:
        tenant = self._index.tenant(slot)
        self._used[tenant] -= self._index.size_bytes[slot]
        if self._is_entered(slot):
            self._order(slot).remove(slot)
            self._followers.remove(slot)
            self._entered[slot] = False
        if not self._used[tenant]:
            del self._used[tenant]
            if tenant not in self._limits:
                self._end_order(tenant)

    def forget(self, slot: int) -> None:
        """Clears the count of followers of a removed chunk."""
        self._followers.forget(slot)

    def check_integrity(self) -> None:
        """Raises StorageError unless the bytes of each tenant are counted correctly and each order has every chunk of
        its tenant once. Examines every chunk. Must not run while new quotas are being applied."""
        used: Counter[str] = Counter()
        ordered: dict[str, set[int]] = {tenant: set() for tenant in self._oldest_first}
        for slot in self._index:
            tenant = self._index.tenant(slot)
            used[tenant] += self._index.size_bytes[slot]
            if tenant in ordered:
                ordered[tenant].add(slot)
        if used != self._used:
            raise StorageError(f"tenants have {dict(used)} bytes, but {dict(self._used)} are counted")
        for tenant, slots in ordered.items():
            queued = list(islice(self._oldest_first[tenant], len(slots) + 1))  # a broken queue may be endless
            if len(queued) != len(slots) or set(queued) != slots:
                raise StorageError(f"the queue of tenant {tenant!r} names other chunks than it has")
        self._followers.check_integrity(chain.from_iterable(ordered.values()))

    def _enter(self, slot: int, order: SlotQueue, *, first: bool = False) -> None:
        self._links.grow(slot)
        if slot >= len(self._entered):
            self._entered.extend(bytes(slot + 1 - len(self._entered)))
        self._entered[slot] = True
        if first and order.oldest != NO_SLOT:
            order.insert_before(slot, order.oldest)
        else:
            order.push(slot)
        self._followers.add(slot)

    def _end_order(self, tenant: str) -> None:
        """Drops the order of a tenant without a limit, once the tenant has no chunks on the node."""
        if not self._used[tenant]:
            self._oldest_first.pop(tenant, None)

    def _is_entered(self, slot: int) -> bool:
        return slot < len(self._entered) and bool(self._entered[slot])

    def _order(self, slot: int) -> SlotQueue:
        """The order that an entered slot is in."""
        return self._oldest_first[self._index.tenant(slot)]
