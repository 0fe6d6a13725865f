"""How much each tenant has on a node, and what of it goes first when the tenant may not have more."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from itertools import chain, islice

from kvstore_cluster.eviction.columns import NO_SLOT, Links, SlotQueue
from kvstore_cluster.eviction.texts import Choice, Followers, choose
from kvstore_cluster.index import ChunkIndex
from kvstore_codec.errors import OverQuotaError, StorageError, TextTooLongError


class Quotas:
    """Not thread-safe: used under the storage node's lock. Only chunks of tenants with a limit, or
    that had one, take time to keep in order."""

    def __init__(self, index: ChunkIndex) -> None:
        self._index = index
        self._limits: dict[str, int] = {}
        self._used: Counter[str] = Counter()
        self._coming: Counter[str] = Counter()
        self._links = Links()
        self._oldest_first: dict[str, SlotQueue] = {}
        self._followers = Followers(index.texts)
        self._entered = bytearray()  # by slot: whether it is in its tenant's order

    def begin_orders(self, tenants: Iterable[str]) -> bool:
        """Keeps from now on an order of what these tenants have. Whether there is a new tenant among them: then what it
        has already is to be entered with `enter_all`."""
        new = [tenant for tenant in tenants if tenant not in self._oldest_first]
        self._oldest_first.update((tenant, SlotQueue(self._links)) for tenant in new)
        return bool(new)

    def enter_all(self, begin: int, end: int) -> None:
        """Enters what was stored before its tenant had an order, of these slots. The last ones come first, so that what
        came since goes after all of it."""
        for slot in reversed(range(begin, end)):
            if self._index.is_linked(slot) and not self._is_entered(slot):
                order = self._oldest_first.get(self._index.tenant(slot))
                if order is not None:
                    self._enter(
                        slot, order, first=True
                    )  # what is behind what is looked at when something has to go

    def set_limits(self, limits: Mapping[str, int]) -> None:
        """Bytes a tenant may have on this node, each with an order by now. What is above a new limit goes when the
        tenant puts something."""
        self._limits = dict(limits)
        for tenant in [tenant for tenant in self._oldest_first if tenant not in limits]:
            self._end_order(tenant)

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
        """Whether any tenant has an order."""
        return bool(self._oldest_first)

    def choose(
        self, tenant: str, missing_bytes: int, may_go: Callable[[int], bool], *, spared: int = NO_SLOT
    ) -> Choice:
        """Of what a tenant with a limit has, what goes first: what it used least lately, of a text its end before its
        beginning, as `texts.choose` says."""
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
        """Why a tenant above its limit may not put a chunk: what `choose` found does not suffice."""
        limit = self._limits[tenant]
        if own_text:
            return TextTooLongError(
                f"of the {limit} bytes that tenant {tenant!r} may have on {node_id}, the beginning of the text has all "
                "that could be had; it is kept. Raise the quota with `kvstore quota`"
            )
        return OverQuotaError(
            f"tenant {tenant!r} may have {limit} bytes on {node_id} and what it has there is leased, pinned or being "
            "read; retry later or raise the quota with `kvstore quota`"
        )

    def add(self, slot: int) -> None:
        tenant = self._index.tenant(slot)
        self._used[tenant] += self._index.size_bytes[slot]
        if (order := self._oldest_first.get(tenant)) is not None:
            self._enter(slot, order)
            self.follow(slot)

    def linked(self, slot: int) -> None:
        """A chunk that is here was linked to the one before it in its text only now."""
        if self._is_entered(slot):
            self._followers.add(slot)

    def succeed(self, slot: int, old: int) -> None:
        """`slot`, not added yet, has the place of `old` in its text."""
        self._followers.succeed(slot, old)

    def touch(self, slot: int) -> None:
        if self._is_entered(slot):
            order = self._order(slot)
            order.remove(slot)
            order.push(slot)

    def follow(self, slot: int) -> None:
        """The chunk, just added or touched, goes before the one that it stands behind, if that is the tenant's."""
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
        """The chunk, which is not here, is no longer found."""
        self._followers.forget(slot)

    def check_integrity(self) -> None:
        """Raises StorageError unless what each tenant has is counted right and, where the tenant has an order, is in it
        once. Looks at every chunk; not while directives take effect."""
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
            queued = list(islice(self._oldest_first[tenant], len(slots) + 1))  # a broken one may have no end
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
        """Of a tenant without a limit, once it has nothing here: an order of some chunks only is not kept."""
        if not self._used[tenant]:
            self._oldest_first.pop(tenant, None)

    def _is_entered(self, slot: int) -> bool:
        return slot < len(self._entered) and bool(self._entered[slot])

    def _order(self, slot: int) -> SlotQueue:
        """Of a slot that was entered."""
        return self._oldest_first[self._index.tenant(slot)]
