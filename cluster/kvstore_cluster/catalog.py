"""Metadata of the chunks on a storage node: names, locations, eviction orders, leases, pins, quotas and reference
counts.

A chunk is in memory, on disk, or in both. The catalog accounts for memory blocks and disk space, and moves no bytes.
The tiers (`memory_tier.py`, `disk_tier.py`) read and write the bytes of acquired chunks without holding the lock.

A "text" is the token sequence of a prompt, stored as consecutive chunks. A "slot" is the number of a stored
chunk. A removed chunk keeps its slot until no reader and no lease needs it.

In this package, "Lock held" in a docstring means that the caller holds `ChunkCatalog.lock` and that the method does not
block. "Call without the lock" means that the caller must not hold the lock, because the method acquires it. "May block"
means that the method does I/O or waits.
"""

import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Set

from cachetools import LRUCache

from kvstore_cluster.arena import Arena, Extent
from kvstore_cluster.disk import Location, RecordMeta, SegmentStore
from kvstore_cluster.events.changes import TierChanges
from kvstore_cluster.eviction import EvictionOrder, EvictionPolicy
from kvstore_cluster.eviction.columns import NO_SLOT
from kvstore_cluster.eviction.texts import Choice
from kvstore_cluster.index import NOWHERE, ChunkIndex
from kvstore_cluster.leases import LeaseTable
from kvstore_cluster.leaving import Leaving
from kvstore_cluster.quotas import Quotas
from kvstore_cluster.stats import NodeCounters
from kvstore_cluster.tallies import EvictionCause, Tallies, Tier
from kvstore_cluster.waiting_uses import WaitingUses
from kvstore_codec.errors import StorageError
from kvstore_codec.identity import ChunkId

# Cached headers of chunks that are on disk only. Lookups return headers, and need no disk read for a cached one.
HEADER_CACHE_BYTES = 32 << 20


class ChunkCatalog:
    """Metadata of all chunks of one node. Read and change every attribute with `lock` held. Only the metadata of an
    acquired chunk, such as its `extent`, may be read without it."""

    def __init__(
        self,
        node_id: str,
        arena: Arena,
        store: SegmentStore | None,
        policy: Callable[[], EvictionPolicy],
        leases: LeaseTable[int],
        *,
        isolated: bool = False,
    ) -> None:
        self.node_id = node_id
        self.lock = threading.Condition()
        """Notified when a chunk becomes dirty, and when a chunk has been written to disk or promoted to memory."""
        self.arena = arena
        self.store = store
        self.leases = leases
        self.counters = NodeCounters()
        self.tallies = Tallies()
        self.index = ChunkIndex(isolated=isolated)
        self.quotas = Quotas(self.index)
        self.in_memory = EvictionOrder(policy(), self.index.texts)
        self.on_disk = EvictionOrder(policy(), self.index.texts)
        self.pins: Mapping[str, Set[ChunkId]] = {}
        """Chunks that operators pinned, by namespace. Such a chunk is pinned as soon as it is inserted."""
        self.pinned: set[int] = set()
        self.dirty: dict[int, None] = {}
        """Slots in memory that are not written to disk yet, oldest first."""
        self.unreadable: set[int] = set()
        """Slots whose last disk read failed."""
        self.disk_headers: LRUCache[int, bytes] = LRUCache(HEADER_CACHE_BYTES, len)
        """Headers recently read from disk, by slot."""
        self.changes: TierChanges | None = None
        """Remembers the chunks that enter or leave a tier, on a node that reports them."""
        self.leaving: Leaving | None = None
        """The chunks of forgotten tenants that are being removed."""
        self.writing: Counter[int] = Counter()
        """Acquired slots whose chunks are being written to disk."""
        self._orders = (self.in_memory, self.on_disk, self.quotas)
        self._readers: Counter[int] = Counter()
        # Memory of dropped copies that readers still use, by slot. The chunks themselves stay in the index.
        self._dropped: dict[int, list[Extent]] = {}
        # Slots of removed chunks that await the end of a lease. A new chunk in such a slot would inherit the lease.
        self._awaiting_lease_end: deque[int] = deque()
        self._touched = WaitingUses()

    # Arrival and removal.

    def insert(
        self,
        meta: RecordMeta,
        *,
        extent: Extent | None,
        location: Location,
        write_back: bool,
        before: int = NO_SLOT,
        replaced: int = NO_SLOT,
    ) -> int:
        """Adds a chunk and returns its slot. `before` is the slot of the nearest stored chunk before it in its text.
        `replaced` is the slot of an older copy of the same chunk, which is removed. Chunks that follow the older copy
        in their text follow the new one, if the tenant is the same. Lock held."""
        self.flush_touches()
        slot = self.index.add(meta, extent=extent, location=location)
        if self.leaving is not None:
            self.leaving.arrived.add(slot)
        if replaced != NO_SLOT:
            self._succeed(slot, replaced)
        if before != NO_SLOT and self.index.texts.before(slot) == NO_SLOT:
            self.index.link_behind(slot, before)
        if extent is not None:
            self.enter(self.in_memory, slot)
        if location != NOWHERE:
            self.enter(self.on_disk, slot)
        elif write_back:
            self.dirty[slot] = None
            self.lock.notify_all()
        if meta.chunk_id in self.pins.get(self.index.namespace(meta.tenant), ()):
            self.pinned.add(slot)
        self.quotas.add(slot)
        if replaced != NO_SLOT:
            self.remove(replaced)
        return slot

    def is_leaving(self, slot: int) -> bool:
        """Whether the chunk is about to be removed, because its tenant was forgotten since it was stored. Lock held."""
        return self.leaving is not None and self.leaving.includes(slot, self.index.tenant(slot))

    def enter(self, order: EvictionOrder, slot: int) -> None:
        """Adds the chunk to the eviction order of a tier. Lock held."""
        index, size_bytes = self.index, self.index.size_bytes[slot]
        self.tallies.entered(self._tier(order), index.encoding(slot), size_bytes)
        if order is self.in_memory:
            # What its eviction frees: otherwise tiny chunks would displace all others.
            size_bytes = self.arena.footprint_bytes(size_bytes)
        order.add(slot, identity=index.identity(slot), size_bytes=size_bytes, cost=index.cost(slot))
        self._changed(slot)

    def link_behind(self, slot: int, before: int) -> None:
        """Links the chunk to `before`, the chunk before it in its text, unless it has such a link. Lock held."""
        if self.index.texts.before(slot) == NO_SLOT and self.index.link_behind(slot, before):
            for order in self._orders:
                order.linked(slot)

    def remove(self, slot: int) -> None:
        """Removes the chunk from the index and the tiers. A restart may recover it from disk. Its memory is freed when
        the last reader releases it. Lock held."""
        self.flush_touches()
        if self.index.extent[slot] is not None:
            self._exit(self.in_memory, slot, evicted=False)
        if self.index.location[slot] != NOWHERE:
            self._leave_disk(slot, evicted=False)
        self._unlink(slot)

    def free_unleased(self, most: int) -> None:
        """Frees slots of removed chunks that awaited the end of a lease. Examines at most `most` slots. Lock held."""
        for _ in range(min(most, len(self._awaiting_lease_end))):
            self._free_or_await_lease_end(self._awaiting_lease_end.popleft())

    # Use.

    def touch(self, slots: Iterable[int]) -> None:
        """Records uses of chunks, in this order. The eviction policies are told later: before their next decision, or
        by the maintenance thread, so that a lookup of a thousand chunks does not wait for them. Lock held."""
        self._touched.add(slots)
        if excess := self._touched.excess:  # only the excess: flushing 65,536 uses at once takes 0.1 s
            self.flush_touches(excess)

    def put_again(self, slot: int, before: int) -> None:
        """Records a put of a stored chunk as a use. `before` is the slot of its predecessor in its text. The chunk is
        evicted no later than its predecessor, as far as the policy allows. Lock held."""
        self.flush_touches()
        self._touch(slot)
        if before != NO_SLOT:
            self.link_behind(slot, before)
        for order in self._orders:
            order.follow(slot)

    def flush_touches(self, most: int | None = None) -> bool:
        """Tells the eviction policies up to `most` recorded uses, oldest first. True when more are left. Lock held."""
        for slot in self._touched.take(most):
            self._touch(slot)
        return len(self._touched) > 0

    def report(self, slot: int, score: float) -> None:
        """Records the share of attention, 0 to 1, that a model paid to the chunk. Lock held."""
        if self.index.extent[slot] is not None:
            self.in_memory.report(slot, score)
        if self.index.location[slot] != NOWHERE:
            self.on_disk.report(slot, score)

    # Reference counts.

    def acquire(self, slot: int) -> None:
        """Keeps the bytes of the slot in place until `release`. Lock held."""
        self._readers[slot] += 1

    def release(self, slot: int) -> None:
        """Ends one `acquire`. The last one frees the memory of a chunk or copy removed in the meantime. Lock held."""
        self._readers[slot] -= 1
        if not self._readers[slot]:
            del self._readers[slot]
            for extent in self._dropped.pop(slot, ()):
                self.arena.free(extent)
            if not self.index.is_linked(slot):
                self._free(slot)

    def is_acquired(self, slot: int) -> bool:
        """Whether a reader or writer has acquired the slot. Lock held."""
        return slot in self._readers

    def dropped_extents(self) -> list[Extent]:
        """Memory of dropped copies that readers still use. Lock held."""
        return [extent for extents in self._dropped.values() for extent in extents]

    # Demotion and eviction.

    def is_protected(self, slot: int) -> bool:
        """Whether the chunk must stay on the node because it is acquired, pinned or leased. Leases count as of the last
        `leases.expire`. Lock held."""
        return slot in self._readers or slot in self.pinned or self.leases.holds(slot)

    def may_demote(self, slot: int) -> bool:
        """Whether the chunk may leave memory and stay on disk. Lock held."""
        return self.index.location[slot] != NOWHERE and slot not in self._readers

    def may_leave_memory(self, slot: int) -> bool:
        """Whether the chunk may be demoted, or evicted if it is not on disk. Lock held."""
        if self.index.location[slot] != NOWHERE:
            return slot not in self._readers
        return slot not in self.dirty and not self.is_protected(slot)

    def is_readable(self, slot: int) -> bool:
        """Whether the chunk is in memory, or its last disk read did not fail. Lock held."""
        return self.index.extent[slot] is not None or slot not in self.unreadable

    def choose(
        self,
        order: EvictionOrder,
        missing_bytes: float,
        size_of: Callable[[int], int],
        may_go: Callable[[int], bool],
        *,
        spared: int = NO_SLOT,
    ) -> Choice:
        """Chooses chunks whose removal from a tier frees `missing_bytes`. Removes none of them. Lock held."""
        self.flush_touches()
        return order.choose(missing_bytes, size_of, may_go, pinned=self.pinned, spared=spared)

    def over_quota(self, tenant: str, size_bytes: int, before: int = NO_SLOT) -> list[int]:
        """Chunks to remove so that the tenant may store `size_bytes` more: its least recently used ones, except
        `before`, the chunk before the new one in its text. Raises OverQuotaError when the chunks that are not protected
        are too small together, and TextTooLongError when only the beginning of the same text is left to evict. Lock
        held."""
        excess_bytes = self.quotas.excess_bytes(tenant, size_bytes)
        if not excess_bytes:
            return []
        self.leases.expire()
        self.flush_touches()
        choice = self.quotas.choose(
            tenant, excess_bytes, lambda slot: not self.is_protected(slot), spared=before
        )
        if sum(self.index.size_bytes[slot] for slot in choice.victims) < excess_bytes:
            raise self.quotas.refusal(tenant, self.node_id, own_text=choice.own_text)
        return choice.victims

    def leave_memory(self, slot: int) -> None:
        """Demotes a chosen chunk, or evicts it if it is not on disk. Lock held."""
        self._exit(self.in_memory, slot, evicted=True)
        if self.index.location[slot] == NOWHERE:
            self._unlink(slot)
            self.count_evictions(EvictionCause.MEMORY_FULL)
        else:
            self.arena.free(self.extent(slot))
            self.index.extent[slot] = None
            self.counters.demotions += 1
            self._changed(slot)

    def leave_disk(self, slot: int) -> None:
        """Removes a chosen chunk from disk, and evicts it if it is not in memory. Lock held."""
        self._leave_disk(slot, evicted=True)
        if self.index.extent[slot] is None:
            self._unlink(slot)
            self.count_evictions(EvictionCause.DISK_FULL)

    def count_evictions(self, cause: EvictionCause, chunks: int = 1) -> None:
        """Counts chunks that were removed from the node to make room. Lock held."""
        self.counters.evictions += chunks
        self.tallies.evicted(cause, chunks)

    def count_served(self, slot: int, tier: Tier, size_bytes: int) -> None:
        """Counts bytes of an acquired chunk that were sent to a reader from `tier`. Lock held."""
        self.counters.bytes_out += size_bytes
        self.tallies.served(tier, self.index.encoding(slot), size_bytes)

    def drop_memory_copy(self, slot: int, extent: Extent) -> None:
        """Drops the damaged memory copy in `extent` of an acquired chunk, unless it was dropped already. Drops the
        chunk itself if it is not on disk. Lock held."""
        if not self.index.is_linked(slot) or self.index.extent[slot] is not extent:
            return
        self.counters.damaged += 1
        if self.index.location[slot] == NOWHERE:
            self.remove(slot)
            return
        self.flush_touches()
        self._exit(self.in_memory, slot, evicted=False)
        self._dropped.setdefault(slot, []).append(extent)
        self.index.extent[slot] = None
        self._changed(slot)

    def drop_disk_copy(self, slot: int) -> None:
        """Drops the lost or damaged disk copy of a chunk, and the chunk itself if it is not in memory. Lock held."""
        if self.index.is_linked(slot) and self.index.location[slot] != NOWHERE:
            self._leave_disk(slot, evicted=False)
            if self.index.extent[slot] is None:
                self._unlink(slot)
            else:  # the maintenance thread writes the memory copy back to disk
                self.dirty[slot] = None
                self.lock.notify_all()
            self.counters.damaged += 1

    def extent(self, slot: int) -> Extent:
        """Memory of a chunk. Raises StorageError when it is not in memory. Lock held, or the chunk acquired."""
        extent = self.index.extent[slot]
        if extent is None:
            raise StorageError(f"{self.node_id} does not have the chunk in slot {slot} in memory")
        return extent

    def _touch(self, slot: int) -> None:
        self.index.used(slot)
        if self.index.extent[slot] is not None:
            self.in_memory.touch(slot)
        if self.index.location[slot] != NOWHERE:
            self.on_disk.touch(slot)
        if self.quotas.limited:
            self.quotas.touch(slot)

    def _succeed(self, slot: int, old: int) -> None:
        """Moves the text links of the replaced chunk in `old` to the new chunk in `slot`."""
        index = self.index
        known = index.texts.number[old] or self.in_memory.followed(old) or self.on_disk.followed(old)
        if known and index.tenant(slot) == index.tenant(old):
            index.texts.succeed(slot, old)
            for order in self._orders:
                order.succeed(slot, old)

    def _unlink(self, slot: int) -> None:
        self.quotas.remove(slot)
        self.index.unlink(slot)
        self._changed(slot)
        for order in self._orders:
            order.forget(slot)
        self.pinned.discard(slot)
        self.dirty.pop(slot, None)
        self._forget_reads(slot)
        if not self._readers[slot]:
            self._free(slot)

    def _free(self, slot: int) -> None:
        del self._readers[slot]
        extent, self.index.extent[slot] = self.index.extent[slot], None
        if extent is not None:
            self.arena.free(extent)
        self._free_or_await_lease_end(slot)

    def _free_or_await_lease_end(self, slot: int) -> None:
        if self.leases.holds(slot):
            self._awaiting_lease_end.append(slot)
        else:
            self.index.free(slot)

    def _exit(self, order: EvictionOrder, slot: int, *, evicted: bool) -> None:
        """Removes the chunk from the eviction order of a tier."""
        order.remove(slot, evicted=evicted)
        self.tallies.entered(self._tier(order), self.index.encoding(slot), -self.index.size_bytes[slot])

    def _tier(self, order: EvictionOrder) -> Tier:
        return Tier.MEMORY if order is self.in_memory else Tier.DISK

    def _leave_disk(self, slot: int, *, evicted: bool) -> None:
        self.flush_touches()
        self._exit(self.on_disk, slot, evicted=evicted)
        if self.store is not None:
            self.store.delete(Location(self.index.location[slot]))
        self.index.location[slot] = NOWHERE
        self._forget_reads(slot)
        self._changed(slot)

    def _changed(self, slot: int) -> None:
        """The chunk entered or left a tier."""
        if self.changes is not None:
            self.changes.add(slot)

    def _forget_reads(self, slot: int) -> None:
        """Forgets cached headers and failed reads of a disk copy that was removed."""
        self.disk_headers.pop(slot, None)
        self.unreadable.discard(slot)
