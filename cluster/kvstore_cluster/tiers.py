"""Where a node's chunks lie: memory above, disk below, and how they move between the two.

A chunk is in memory, on disk, or in both. Puts arrive in memory and are written through to the disk, or back to it
later; memory that is needed is taken from chunks that are on disk too (they are *demoted*), what is read from the disk
is *promoted*, and what is in neither tier any more was *evicted*. While the disk is made slow for an experiment, what
is on it is only there: nothing is promoted, and all memory that may be demoted is.
"""

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Set

from kvstore_cluster.arena import Arena, Extent
from kvstore_cluster.disk import Location, RecordMeta, SegmentStore, record_bytes
from kvstore_cluster.disk_reads import DiskReads, LostChunkError, UnreadableChunkError, require_sound
from kvstore_cluster.eviction import EvictionOrder, EvictionPolicy
from kvstore_cluster.eviction.columns import NO_SLOT
from kvstore_cluster.eviction.texts import Choice
from kvstore_cluster.index import NOWHERE, ChunkIndex
from kvstore_cluster.leases import LeaseTable
from kvstore_cluster.quotas import Quotas
from kvstore_cluster.slices import REMOVED_CHUNKS
from kvstore_cluster.stats import NodeCounters
from kvstore_codec.errors import (
    ArenaFullError,
    ChunkFormatError,
    ChunkNotFoundError,
    DiskFullError,
    StorageError,
    TextTooLongError,
)
from kvstore_codec.identity import ChunkId

log = logging.getLogger(__name__)

# The keeper begins to demote above the high watermark and stops at the low one, so that puts find free memory.
HIGH_WATERMARK, LOW_WATERMARK = 0.95, 0.90
# A range of at least this part of a chunk brings the whole chunk into memory, a smaller one is read alone.
PROMOTE_FROM = 0.5
FLUSH_PATIENCE_S = 2.0
_MOST_TOUCHED = 1 << 16
_DISK_TRIES = 3


class Tiers:
    """The books are changed under `lock` only; bytes are written and read outside it, in chunks that are held."""

    def __init__(
        self,
        node_id: str,
        arena: Arena,
        store: SegmentStore | None,
        policy: Callable[[], EvictionPolicy],
        leases: LeaseTable[int],
        counters: NodeCounters,
    ) -> None:
        self.node_id = node_id
        self.arena = arena
        self._store = store
        self.leases = leases
        self.counters = counters
        self.index = ChunkIndex()
        self.quotas = Quotas(self.index)
        self.in_memory = EvictionOrder(policy(), self.index.texts)
        self.on_disk = EvictionOrder(policy(), self.index.texts)
        self.pinned: set[int] = set()
        self.dirty: dict[int, None] = {}
        """Slots that are in memory and still have to be written to the disk, oldest first."""
        self.lock = threading.Condition()
        self.pins: Set[ChunkId] = frozenset()
        """What is pinned as it comes."""
        self._orders = (self.in_memory, self.on_disk, self.quotas)
        self._readers: Counter[int] = Counter()
        self._promoting: set[int] = set()
        # Of chunks that stay, while somebody still reads this copy.
        self._dropped: dict[int, list[Extent]] = {}
        # Free slots that a lease still names: the next chunk there would profit.
        self._resting: deque[int] = deque()
        self._touched: list[int] = []
        self.disk_reads = DiskReads(node_id, store, self.index, self.lock, counters, self._give_up_on_disk)

    # Books: the caller has the lock.

    def dropped_extents(self) -> list[Extent]:
        return [extent for extents in self._dropped.values() for extent in extents]

    def drop_from_memory(self, slot: int) -> None:
        """The copy in memory of a held chunk that is on disk too."""
        self.flush_touches()
        self.in_memory.remove(slot, evicted=False)
        self._dropped.setdefault(slot, []).append(self._extent(slot))
        self.index.extent[slot] = None

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
        """`before` is the slot of the nearest chunk before it in its text, `replaced` that of the same chunk, which is
        no longer found then: what stands behind that one stands behind this one, if the tenant is the same."""
        self.flush_touches()
        slot = self.index.add(meta, extent=extent, location=location)
        if replaced != NO_SLOT:
            self._succeed(slot, replaced)
        if before != NO_SLOT and self.index.texts.before(slot) == NO_SLOT:
            self.index.link(slot, before)
        if extent is not None:
            self._enter(self.in_memory, slot)
        if location != NOWHERE:
            self._enter(self.on_disk, slot)
        elif write_back:
            self.dirty[slot] = None
            self.lock.notify_all()
        if meta.chunk_id in self.pins:
            self.pinned.add(slot)
        self.quotas.add(slot)
        if replaced != NO_SLOT:
            self.remove(replaced)
        return slot

    def adopt(self, records: Iterable[tuple[RecordMeta, Location]]) -> None:
        """What was found on the disk. Of a text the end may come before the beginning: compaction moves records. What
        the index has no room for is dropped."""
        waiting: dict[tuple[ChunkId, str], list[int]] = {}  # for the chunk that they stand behind
        refused: list[Location] = []
        for meta, location in records:
            behind = () if meta.behind is None else (meta.behind,)
            before = self.index.stands_behind(meta.tenant, meta.number, behind, meta.encoding)
            try:
                slot = self.insert(meta, extent=None, location=location, write_back=False, before=before)
            except StorageError as error:
                if not refused:
                    log.warning("%s drops chunks from its disk: %s", self.node_id, error)
                refused.append(location)
                continue
            if meta.behind is not None and before == NO_SLOT:
                waiting.setdefault((meta.behind, meta.tenant), []).append(slot)
            for follower in waiting.pop((meta.chunk_id, meta.tenant), ()):
                self._link(follower, slot)
        for location in refused:  # not before all records are read
            self._disk.delete(location)

    def remove(self, slot: int) -> None:
        """The chunk is no longer found, although it may come back from the disk after a restart. Its memory is given
        back when the last reader has gone."""
        self.flush_touches()
        if self.index.extent[slot] is not None:
            self.in_memory.remove(slot, evicted=False)
        if self.index.location[slot] != NOWHERE:
            self._leave_disk(slot, evicted=False)
        self._unlist(slot)

    def touch(self, slots: Iterable[int]) -> None:
        """They were used, in this order. The policies hear of it before they are next asked for anything, or from the
        keeper: a lookup of a thousand chunks need not wait for that."""
        self._touched.extend(slots)
        if len(self._touched) > _MOST_TOUCHED:
            # As many as there are too many: telling 65,536 uses at once takes a tenth of a second.
            self.flush_touches(len(self._touched) - _MOST_TOUCHED)

    def put_again(self, slot: int, before: int) -> None:
        """The chunk came again with its text, behind `before`: that is a use, and it is worth no more than that one."""
        self.flush_touches()
        self._touch(slot)
        if before != NO_SLOT:
            self._link(slot, before)
        for order in self._orders:
            order.follow(slot)

    def flush_touches(self, most: int | None = None) -> bool:
        """Tells the policies what was used, the oldest `most` uses of it; True when there are more."""
        touched = self._touched[:most]
        del self._touched[:most]
        for slot in touched:
            self._touch(slot)
        return bool(self._touched)

    def report(self, slot: int, score: float) -> None:
        if self.index.extent[slot] is not None:
            self.in_memory.report(slot, score)
        if self.index.location[slot] != NOWHERE:
            self.on_disk.report(slot, score)

    def hold(self, slot: int) -> None:
        """The slot's bytes stay where they are until `release`."""
        self._readers[slot] += 1

    def release(self, slot: int) -> None:
        self._readers[slot] -= 1
        if not self._readers[slot]:
            del self._readers[slot]
            for extent in self._dropped.pop(slot, ()):
                self.arena.free(extent)
            if not self.index.listed(slot):
                self._free(slot)

    def is_readable(self, slot: int) -> bool:
        """Whether the last read of it did not fail, or memory has it."""
        return self.index.extent[slot] is not None or slot not in self.disk_reads.unreadable

    def reserve(
        self,
        size_bytes: int,
        *,
        before: int = NO_SLOT,
        may_demote_before: bool = True,
        patience_s: float = 0.0,
    ) -> Extent:
        """Memory for a chunk, demoting or evicting what nobody uses, but not `before`, the chunk before it in its text,
        unless that stays on disk and `may_demote_before`. Raises ArenaFullError, and TextTooLongError where only
        `before` could go; then nothing was evicted. Waits up to `patience_s` for chunks that are being written to
        the disk."""
        needed_bytes = self.arena.footprint_bytes(size_bytes)
        deadline_s = time.monotonic() + patience_s
        while True:
            missing_bytes = needed_bytes - (self.arena.capacity_bytes - self.arena.used_bytes)
            if missing_bytes <= 0:
                return self.arena.allocate(size_bytes)
            stays = before != NO_SLOT and (before in self.dirty or self.index.location[before] != NOWHERE)
            choice = self._clear_memory(missing_bytes, NO_SLOT if stays and may_demote_before else before)
            if choice is None:
                return self.arena.allocate(size_bytes)
            if choice.own_text:
                raise TextTooLongError(
                    f"{self.node_id} keeps the beginning of a text rather than what follows it, and in its "
                    f"{self.arena.capacity_bytes} bytes has nothing else that could go; give the node more memory"
                )
            patience_s = deadline_s - time.monotonic()
            if not self.dirty or patience_s <= 0:
                raise ArenaFullError(
                    f"{self.node_id} has no room for {needed_bytes} bytes: all that is stored in its "
                    f"{self.arena.capacity_bytes} bytes is leased, pinned, being read or being written; retry later "
                    "or give the node more memory"
                )
            self.lock.wait(patience_s)

    def over_quota(self, tenant: str, size_bytes: int, before: int = NO_SLOT) -> list[int]:
        """What has to go so that the tenant may have `size_bytes` more: what it used least lately, but not `before`,
        the chunk before the new one in its text. Raises OverQuotaError, TextTooLongError where only that is left."""
        excess_bytes = self.quotas.excess_bytes(tenant, size_bytes)
        if not excess_bytes:
            return []
        self.leases.expire()
        self.flush_touches()
        choice = self.quotas.choose(
            tenant, excess_bytes, lambda slot: not self._protected(slot), spared=before
        )
        if sum(self.index.size_bytes[slot] for slot in choice.victims) < excess_bytes:
            raise self.quotas.refusal(tenant, self.node_id, own_text=choice.own_text)
        return choice.victims

    def header_in_memory(self, slot: int) -> bytes | None:
        """None when it has to be read from the disk."""
        extent = self.index.extent[slot]
        if extent is None:
            return self.disk_reads.known_header(slot)
        return self.arena.beginning(extent, self.index.header_bytes[slot])

    # Bytes: the caller holds the slot and does not have the lock.

    def header(self, slot: int) -> bytes:
        """Raises ChunkNotFoundError when the chunk has gone meanwhile, or its disk has lost it or cannot read it."""
        with self.lock:
            header = self.header_in_memory(slot)
        return self.disk_reads.header(slot) if header is None else header

    def views(self, slot: int, offset: int, length: int) -> Iterator[memoryview]:
        """These bytes of a chunk: as they lie in memory, where a large range brings the whole chunk, else read from
        the disk. Raises ChunkNotFoundError as `header` does."""
        extent = self.index.extent[slot]
        large = length >= PROMOTE_FROM * self.index.size_bytes[slot]
        if extent is None and large and not self._disk_is_slow:
            extent = self._promote(slot)
        if extent is not None:
            return self.arena.views(extent, offset, length)
        return iter([self.disk_reads.frames(slot, offset, length, lambda: self.header(slot))])

    def verify(self, slot: int) -> str | None:
        """Reads the chunk in each tier that it is in; why it is damaged or unreadable, if it is. A damaged copy is
        dropped."""
        extent = self.index.extent[slot]
        if extent is not None:
            try:
                require_sound(self.index, slot, list(self.arena.views(extent)))
            except ChunkFormatError as error:
                with self.lock:
                    if self.index.listed(slot):
                        self.counters.damaged += 1
                        if self.index.location[slot] == NOWHERE:
                            self.remove(slot)
                        else:
                            self.drop_from_memory(slot)
                return f"in memory: {error}"
        if self.index.location[slot] == NOWHERE:
            return None
        try:
            self.disk_reads.chunk(slot, [memoryview(bytearray(self.index.size_bytes[slot]))])
        except (LostChunkError, UnreadableChunkError) as error:
            return str(error)
        except ChunkNotFoundError:  # evicted or deleted meanwhile
            return None
        return None

    def write(self, meta: RecordMeta, extent: Extent, *, sync: bool, before: int = NO_SLOT) -> Location:
        """Appends a chunk to the disk, evicting from it what nobody uses, but not `before`, the chunk before it in its
        text. Raises DiskError."""
        views = list(self.arena.views(extent))
        tries = _DISK_TRIES
        while True:
            with self.lock:
                self._clear_disk(meta.size_bytes, before)
            try:
                return self._disk.append(meta, views, sync=sync)
            except DiskFullError:
                # What was evicted takes room until its segment is compacted. Where there is nothing to compact, the
                # keeper or another put has just done it, and maybe taken the room.
                if not self.compact():
                    tries -= 1
                if not tries:
                    raise

    def make_durable(self, slot: int) -> None:
        """The chunk shall survive a power loss. Raises DiskError."""
        with self.lock:
            meta, extent = self.index.meta(slot), self.index.extent[slot]
            on_disk = self.index.location[slot] != NOWHERE
            before = self.index.texts.before(slot)
        if on_disk or extent is None:
            self._disk.sync()
            return
        location = self.write(meta, extent, sync=True, before=before)
        with self.lock:
            self.written(slot, location)

    # Movement behind the clients' backs: called by the keeper, without the lock.

    def flush(self) -> bool:
        """Writes the oldest dirty chunk to the disk; False when there is none."""
        with self.lock:
            if not self.dirty:
                return False
            slot = next(iter(self.dirty))
            self.hold(slot)
            meta, before = self.index.meta(slot), self.index.texts.before(slot)
        location = NOWHERE
        try:
            location = self.write(meta, self._extent(slot), sync=False, before=before)
        except StorageError as error:
            log.warning("%s keeps chunk %s in memory only: %s", self.node_id, meta.chunk_id.short, error)
        finally:
            with self.lock:
                if location != NOWHERE:
                    self.written(slot, location)
                else:
                    self.dirty.pop(slot, None)
                    self.counters.disk_refused += 1
                self.release(slot)
                self.lock.notify_all()
        return True

    def written(self, slot: int, location: Location) -> None:
        """The chunk is on disk too now; the caller has the lock. Another copy there, or none in the index any more,
        makes this one garbage."""
        self.dirty.pop(slot, None)
        if self.index.listed(slot) and self.index.location[slot] == NOWHERE:
            self.index.location[slot] = location
            self._enter(self.on_disk, slot)
        else:
            self._disk.delete(location)

    def demote(self) -> None:
        """Frees memory down to the low watermark when it is above the high one, as far as chunks are on disk too; all
        of it while the disk is made slow."""
        with self.lock:
            high, low = (0.0, 0.0) if self._disk_is_slow else (HIGH_WATERMARK, LOW_WATERMARK)
            capacity_bytes = self.arena.capacity_bytes
            if self._store is None or self.arena.used_bytes < high * capacity_bytes:
                return
            excess_bytes = self.arena.used_bytes - low * capacity_bytes
            choice = self._choose(self.in_memory, excess_bytes, self._footprint, self._on_disk_unread)
            for slot in choice.victims:
                self._leave_memory(slot)

    def expire(self, now_s: float) -> bool:
        """Removes chunks whose time is over, unless somebody reads them or has them leased. Looks at REMOVED_CHUNKS at
        most; True when there are more."""
        with self.lock:
            self.leases.expire()
            for _ in range(min(REMOVED_CHUNKS, len(self._resting))):
                self._rest_or_free(self._resting.popleft())
            for slot in self.index.expiries.due(now_s, REMOVED_CHUNKS):
                if not (self._readers[slot] or self.leases.holds(slot)):
                    self.remove(slot)
                    self.counters.expired += 1
            return self.index.expiries.has_due(now_s)

    def relocate(self, meta: RecordMeta, old: Location, new: Location) -> bool:
        """A record moved to another segment; False when nobody needs it any more."""
        with self.lock:
            slot = self.index.find(meta.chunk_id, meta.encoding)
            if slot is None or self.index.location[slot] != old:
                return False
            self.index.location[slot] = new
            return True

    def lost(self, meta: RecordMeta, location: Location) -> None:
        """Compaction found a record damaged."""
        with self.lock:
            slot = self.index.find(meta.chunk_id, meta.encoding)
            if slot is not None and self.index.location[slot] == location:
                self._give_up_on_disk(slot)

    def compact(self) -> bool:
        """One step; True when there may be more to do. Raises DiskError."""
        return self._disk.compact(self.relocate, self.lost)

    # What only this class does.

    @property
    def _disk(self) -> SegmentStore:
        """Used only where a chunk is, or may be, on disk."""
        if self._store is None:
            raise StorageError(f"{self.node_id} has no disk")
        return self._store

    @property
    def _disk_is_slow(self) -> bool:
        return self._store is not None and self._store.read_speed.limit_bytes_per_s is not None

    def _extent(self, slot: int) -> Extent:
        """Of a chunk that is in memory."""
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

    def _enter(self, order: EvictionOrder, slot: int) -> None:
        index = self.index
        order.add(
            slot, identity=index.identity(slot), size_bytes=index.size_bytes[slot], cost=index.cost(slot)
        )

    def _link(self, slot: int, before: int) -> None:
        """Unless the slot is linked already."""
        if self.index.texts.before(slot) == NO_SLOT and self.index.link(slot, before):
            for order in self._orders:
                order.linked(slot)

    def _succeed(self, slot: int, old: int) -> None:
        """The chunk in `slot`, new, keeps what is known of its text where it was stored in `old`."""
        index = self.index
        known = index.texts.number[old] or self.in_memory.followed(old) or self.on_disk.followed(old)
        if known and index.tenant(slot) == index.tenant(old):
            index.texts.succeed(slot, old)
            for order in self._orders:
                order.succeed(slot, old)

    def _unlist(self, slot: int) -> None:
        self.quotas.remove(slot)
        self.index.unlist(slot)
        for order in self._orders:
            order.forget(slot)
        self.pinned.discard(slot)
        self.dirty.pop(slot, None)
        self.disk_reads.forget(slot)
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

    def _leave_memory(self, slot: int) -> None:
        """The policy proposed it."""
        self.in_memory.remove(slot, evicted=True)
        if self.index.location[slot] == NOWHERE:
            self._unlist(slot)
            self.counters.evictions += 1
        else:
            self.arena.free(self._extent(slot))
            self.index.extent[slot] = None
            self.counters.demotions += 1

    def _leave_disk(self, slot: int, *, evicted: bool) -> None:
        self.flush_touches()
        self.on_disk.remove(slot, evicted=evicted)
        self._disk.delete(Location(self.index.location[slot]))
        self.index.location[slot] = NOWHERE
        self.disk_reads.forget(slot)

    def _clear_memory(self, missing_bytes: int, spared: int) -> Choice | None:
        """None, or the choice that does not suffice; then nothing was freed."""
        self.leases.expire()
        choice = self._choose(
            self.in_memory, missing_bytes, self._footprint, self._may_leave_memory, spared=spared
        )
        if sum(map(self._footprint, choice.victims)) < missing_bytes:
            return choice
        for slot in choice.victims:
            self._leave_memory(slot)
        return None

    def _clear_disk(self, size_bytes: int, before: int) -> None:
        """Raises DiskFullError when what is on disk is all protected, or the text's own beginning; then nothing was
        evicted."""
        excess_bytes = self._disk.live_bytes + record_bytes(size_bytes) - self._disk.capacity_bytes
        if excess_bytes <= 0:
            return
        self.leases.expire()
        choice = self._choose(
            self.on_disk,
            excess_bytes,
            self._record_bytes,
            lambda slot: not self._protected(slot),
            spared=self.on_disk.nearest(before),
        )
        if sum(map(self._record_bytes, choice.victims)) < excess_bytes:
            raise DiskFullError(
                f"the disk of {self.node_id} has no room for {size_bytes} bytes: all that is stored in its "
                f"{self._disk.capacity_bytes} bytes is leased, pinned, being read or the beginning of the same text; "
                "give the node more disk"
            )
        for slot in choice.victims:
            self._leave_disk(slot, evicted=True)
            if self.index.extent[slot] is None:
                self._unlist(slot)
                self.counters.evictions += 1

    def _choose(
        self,
        order: EvictionOrder,
        missing_bytes: float,
        size_of: Callable[[int], int],
        may_go: Callable[[int], bool],
        *,
        spared: int = NO_SLOT,
    ) -> Choice:
        """What is to leave a tier. Nothing has left yet."""
        self.flush_touches()
        return order.choose(missing_bytes, size_of, may_go, pinned=self.pinned, spared=spared)

    def _record_bytes(self, slot: int) -> int:
        return record_bytes(self.index.size_bytes[slot])

    def _footprint(self, slot: int) -> int:
        return self.arena.footprint_bytes(self.index.size_bytes[slot])

    def _may_leave_memory(self, slot: int) -> bool:
        if self.index.location[slot] != NOWHERE:
            return self._on_disk_unread(slot)
        return slot not in self.dirty and not self._protected(slot)

    def _on_disk_unread(self, slot: int) -> bool:
        return self.index.location[slot] != NOWHERE and slot not in self._readers

    def _protected(self, slot: int) -> bool:
        return slot in self._readers or slot in self.pinned or self.leases.holds(slot)

    def _promote(self, slot: int) -> Extent | None:
        """Reads a chunk into memory; None where there is no room. Only one thread does it, the others wait."""
        with self.lock:
            self.lock.wait_for(lambda: slot not in self._promoting)
            if (extent := self.index.extent[slot]) is not None:
                return extent
            try:
                extent = self.reserve(
                    self.index.size_bytes[slot],
                    before=self.in_memory.nearest(self.index.texts.before(slot)),
                    may_demote_before=False,
                )
            except ArenaFullError:
                return None
            self._promoting.add(slot)
        try:
            self.disk_reads.chunk(slot, list(self.arena.views(extent)))
        except BaseException:
            with self.lock:
                self.arena.free(extent)
            raise
        else:
            with self.lock:
                self.index.extent[slot] = extent
                self.counters.promotions += 1
                if self.index.listed(slot):
                    self._enter(self.in_memory, slot)
            return extent
        finally:
            with self.lock:
                self._promoting.discard(slot)
                self.lock.notify_all()

    def _give_up_on_disk(self, slot: int) -> None:
        if self.index.listed(slot) and self.index.location[slot] != NOWHERE:
            self._leave_disk(slot, evicted=False)
            if self.index.extent[slot] is None:
                self._unlist(slot)
            else:  # the copy in memory is sound, or nobody knows: written again, once it has been read
                self.dirty[slot] = None
            self.counters.damaged += 1
