"""What a storage node knows of its chunks, behind the node's one lock: names, places, eviction orders, leases, pins,
quotas, and who reads what.

A chunk is in memory, on disk, or in both. Blocks of memory and room on the disk are accounted for here, which moves no
byte. The tiers (`memory_tier.py`, `disk_tier.py`) read and write bytes without the lock, in chunks that are acquired.

In this package, "Lock held" in a docstring means that the caller has `ChunkCatalog.lock`, and that the method does not
block. "Lock not held" means that the caller must not have it, because the method takes it; it "may block" where it does
I/O or waits.
"""

import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Set

from cachetools import LRUCache

from kvstore_cluster.arena import Arena, Extent
from kvstore_cluster.disk import Location, RecordMeta, SegmentStore
from kvstore_cluster.eviction import EvictionOrder, EvictionPolicy
from kvstore_cluster.eviction.columns import NO_SLOT
from kvstore_cluster.eviction.texts import Choice
from kvstore_cluster.index import NOWHERE, ChunkIndex
from kvstore_cluster.leases import LeaseTable
from kvstore_cluster.quotas import Quotas
from kvstore_cluster.stats import NodeCounters
from kvstore_cluster.waiting_uses import WaitingUses
from kvstore_codec.errors import StorageError
from kvstore_codec.identity import ChunkId

# Headers of chunks that are on disk only: what lookups answer with.
HEADER_CACHE_BYTES = 32 << 20


class ChunkCatalog:
    """Metadata of all chunks of one node. Every attribute is read and changed with `lock` held."""

    def __init__(
        self,
        node_id: str,
        arena: Arena,
        store: SegmentStore | None,
        policy: Callable[[], EvictionPolicy],
        leases: LeaseTable[int],
    ) -> None:
        self.node_id = node_id
        self.lock = threading.Condition()
        """Notified when a chunk waits for the disk, and when one has been written or promoted."""
        self.arena = arena
        self.store = store
        self.leases = leases
        self.counters = NodeCounters()
        self.index = ChunkIndex()
        self.quotas = Quotas(self.index)
        self.in_memory = EvictionOrder(policy(), self.index.texts)
        self.on_disk = EvictionOrder(policy(), self.index.texts)
        self.pins: Set[ChunkId] = frozenset()
        """Chunks that are pinned when they arrive."""
        self.pinned: set[int] = set()
        self.dirty: dict[int, None] = {}
        """Slots that are in memory and still have to be written to the disk, oldest first."""
        self.unreadable: set[int] = set()
        """Slots whose last read from the disk failed."""
        self.disk_headers: LRUCache[int, bytes] = LRUCache(HEADER_CACHE_BYTES, len)
        """Headers that were read from the disk lately, by slot."""
        self._orders = (self.in_memory, self.on_disk, self.quotas)
        self._readers: Counter[int] = Counter()
        # Copies in memory that were dropped while they are read; their chunks stay.
        self._dropped: dict[int, list[Extent]] = {}
        # Free slots that a lease still names: the next chunk there would profit.
        self._resting: deque[int] = deque()
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
        """Adds a chunk and returns its slot. `before` is the slot of the nearest chunk before it in its text.
        `replaced` is the slot of the same chunk, which is removed; what stands behind that one stands behind this one,
        if the tenant is the same. Lock held."""
        self.flush_touches()
        slot = self.index.add(meta, extent=extent, location=location)
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
        if meta.chunk_id in self.pins:
            self.pinned.add(slot)
        self.quotas.add(slot)
        if replaced != NO_SLOT:
            self.remove(replaced)
        return slot

    def enter(self, order: EvictionOrder, slot: int) -> None:
        """The chunk came into a tier. Lock held."""
        index = self.index
        order.add(
            slot, identity=index.identity(slot), size_bytes=index.size_bytes[slot], cost=index.cost(slot)
        )

    def link_behind(self, slot: int, before: int) -> None:
        """The chunk stands behind `before` in their text, unless it stands behind one already. Lock held."""
        if self.index.texts.before(slot) == NO_SLOT and self.index.link_behind(slot, before):
            for order in self._orders:
                order.linked(slot)

    def remove(self, slot: int) -> None:
        """The chunk is no longer found, although it may come back from the disk after a restart. Its memory is freed
        when the last reader has gone. Lock held."""
        self.flush_touches()
        if self.index.extent[slot] is not None:
            self.in_memory.remove(slot, evicted=False)
        if self.index.location[slot] != NOWHERE:
            self._leave_disk(slot, evicted=False)
        self._unlink(slot)

    def free_rested(self, most: int) -> None:
        """Frees slots of chunks that have gone, unless a lease names them still; looks at `most` of them. Lock
        held."""
        for _ in range(min(most, len(self._resting))):
            self._rest_or_free(self._resting.popleft())

    # Use.

    def touch(self, slots: Iterable[int]) -> None:
        """The chunks were used, in this order. The policies hear of it before they are next asked for anything, or from
        the maintenance thread: a lookup of a thousand chunks need not wait for that. Lock held."""
        self._touched.add(slots)
        if (
            excess := self._touched.excess
        ):  # and no more: telling 65,536 uses at once takes a tenth of a second
            self.flush_touches(excess)

    def put_again(self, slot: int, before: int) -> None:
        """The chunk came again with its text, behind `before`: that is a use, and it is worth no more than that one.
        Lock held."""
        self.flush_touches()
        self._touch(slot)
        if before != NO_SLOT:
            self.link_behind(slot, before)
        for order in self._orders:
            order.follow(slot)

    def flush_touches(self, most: int | None = None) -> bool:
        """Tells the policies the uses that wait, the oldest `most` of them; True when there are more. Lock held."""
        for slot in self._touched.take(most):
            self._touch(slot)
        return len(self._touched) > 0

    def report(self, slot: int, score: float) -> None:
        """Attention, 0 to 1, that a model paid to the chunk. Lock held."""
        if self.index.extent[slot] is not None:
            self.in_memory.report(slot, score)
        if self.index.location[slot] != NOWHERE:
            self.on_disk.report(slot, score)

    # Reference counts.

    def acquire(self, slot: int) -> None:
        """The slot's bytes stay where they are until `release`. Lock held."""
        self._readers[slot] += 1

    def release(self, slot: int) -> None:
        """Ends one `acquire`. The last one frees the memory of a chunk or copy that has gone meanwhile. Lock held."""
        self._readers[slot] -= 1
        if not self._readers[slot]:
            del self._readers[slot]
            for extent in self._dropped.pop(slot, ()):
                self.arena.free(extent)
            if not self.index.is_linked(slot):
                self._free(slot)

    def is_acquired(self, slot: int) -> bool:
        """Whether somebody reads or writes the slot's bytes. Lock held."""
        return slot in self._readers

    def dropped_extents(self) -> list[Extent]:
        """Memory of copies that were dropped and are still read. Lock held."""
        return [extent for extents in self._dropped.values() for extent in extents]

    # What may leave, and leaving.

    def is_protected(self, slot: int) -> bool:
        """Whether the chunk must stay on the node: it is read, pinned or leased, as of the last `leases.expire`. Lock
        held."""
        return slot in self._readers or slot in self.pinned or self.leases.holds(slot)

    def may_demote(self, slot: int) -> bool:
        """Whether the chunk may leave memory and stay on the node. Lock held."""
        return self.index.location[slot] != NOWHERE and slot not in self._readers

    def may_leave_memory(self, slot: int) -> bool:
        """Whether the chunk may be demoted, or evicted where the disk does not have it. Lock held."""
        if self.index.location[slot] != NOWHERE:
            return slot not in self._readers
        return slot not in self.dirty and not self.is_protected(slot)

    def is_readable(self, slot: int) -> bool:
        """Whether memory has the chunk, or its last read from the disk did not fail. Lock held."""
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
        """What is to leave a tier, so that it has `missing_bytes` more. Nothing has left yet. Lock held."""
        self.flush_touches()
        return order.choose(missing_bytes, size_of, may_go, pinned=self.pinned, spared=spared)

    def over_quota(self, tenant: str, size_bytes: int, before: int = NO_SLOT) -> list[int]:
        """What has to go so that the tenant may have `size_bytes` more: what it used least lately, but not `before`,
        the chunk before the new one in its text. Raises OverQuotaError, TextTooLongError where only that is left. Lock
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
        """Demotes a chunk that was chosen, or evicts it where the disk does not have it. Lock held."""
        self.in_memory.remove(slot, evicted=True)
        if self.index.location[slot] == NOWHERE:
            self._unlink(slot)
            self.counters.evictions += 1
        else:
            self.arena.free(self.extent(slot))
            self.index.extent[slot] = None
            self.counters.demotions += 1

    def leave_disk(self, slot: int) -> None:
        """Takes a chunk that was chosen off the disk, and evicts it where memory does not have it. Lock held."""
        self._leave_disk(slot, evicted=True)
        if self.index.extent[slot] is None:
            self._unlink(slot)
            self.counters.evictions += 1

    def drop_memory_copy(self, slot: int, extent: Extent) -> None:
        """The copy of an acquired chunk in `extent` is damaged. Drops it, unless it was dropped already, and the chunk
        where the disk does not have it. Lock held."""
        if not self.index.is_linked(slot) or self.index.extent[slot] is not extent:
            return
        self.counters.damaged += 1
        if self.index.location[slot] == NOWHERE:
            self.remove(slot)
            return
        self.flush_touches()
        self.in_memory.remove(slot, evicted=False)
        self._dropped.setdefault(slot, []).append(extent)
        self.index.extent[slot] = None

    def drop_disk_copy(self, slot: int) -> None:
        """The copy on the disk is lost. Drops it, and the chunk where memory does not have it. Lock held."""
        if self.index.is_linked(slot) and self.index.location[slot] != NOWHERE:
            self._leave_disk(slot, evicted=False)
            if self.index.extent[slot] is None:
                self._unlink(slot)
            else:  # the copy in memory is sound, or not read yet: it is written again, once it has been read
                self.dirty[slot] = None
            self.counters.damaged += 1

    def extent(self, slot: int) -> Extent:
        """Where a chunk that is in memory lies there. Lock held, or the chunk acquired."""
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
        """The chunk in `slot`, new, keeps what is known of its text where it was stored in `old`."""
        index = self.index
        known = index.texts.number[old] or self.in_memory.followed(old) or self.on_disk.followed(old)
        if known and index.tenant(slot) == index.tenant(old):
            index.texts.succeed(slot, old)
            for order in self._orders:
                order.succeed(slot, old)

    def _unlink(self, slot: int) -> None:
        self.quotas.remove(slot)
        self.index.unlink(slot)
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
        self._rest_or_free(slot)

    def _rest_or_free(self, slot: int) -> None:
        if self.leases.holds(slot):
            self._resting.append(slot)
        else:
            self.index.free(slot)

    def _leave_disk(self, slot: int, *, evicted: bool) -> None:
        self.flush_touches()
        self.on_disk.remove(slot, evicted=evicted)
        if self.store is not None:
            self.store.delete(Location(self.index.location[slot]))
        self.index.location[slot] = NOWHERE
        self._forget_reads(slot)

    def _forget_reads(self, slot: int) -> None:
        """The slot's copy on the disk has gone."""
        self.disk_headers.pop(slot, None)
        self.unreadable.discard(slot)
