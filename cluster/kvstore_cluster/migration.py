"""How chunks move between the tiers of a storage node, and leave it when their time is over.

Puts arrive in memory and are written through to the disk, or back to it later (they are *flushed*). Memory that is
needed is taken from chunks that are on disk too (they are *demoted*), what is read from the disk is *promoted*, and
what is in neither tier any more was *evicted*.
"""

import logging
import time

from kvstore_cluster.arena import Extent
from kvstore_cluster.catalog import ChunkCatalog
from kvstore_cluster.disk import Location
from kvstore_cluster.disk_tier import DiskTier
from kvstore_cluster.index import NOWHERE
from kvstore_cluster.memory_tier import MemoryTier
from kvstore_cluster.residency import Residency
from kvstore_cluster.slices import PAUSE_S, REMOVED_CHUNKS, SLICE_CHUNKS, locked_slice
from kvstore_codec.errors import ArenaFullError, DiskError, StorageError

log = logging.getLogger(__name__)


class Migration:
    """Driven by the maintenance thread through `step`, and by puts and reads that need a chunk in the other tier now.
    Thread-safe; the lock of the catalog is not held by callers."""

    def __init__(
        self, catalog: ChunkCatalog, memory: MemoryTier, disk: DiskTier, residency: Residency
    ) -> None:
        self._catalog = catalog
        self._memory = memory
        self._disk = disk
        self._residency = residency
        self._promoting: set[int] = set()

    def step(self, now_s: float) -> bool:
        """Tells the policies what was used, removes what expired at unix time `now_s`, writes one chunk back, demotes,
        and compacts one segment; True when there is more to do at once. Lock not held; may block. Raises DiskError."""
        more = True
        while more:
            with locked_slice(self._catalog.lock, first=False):
                more = self._catalog.flush_touches(SLICE_CHUNKS)
        while self.expire(now_s):
            time.sleep(PAUSE_S)
        busy = self.flush()
        self.demote()
        self._disk.write_tombstones()
        if self._disk.is_present:
            try:
                busy |= self._disk.compact()
            except DiskError:
                if not busy:  # what is to be written back does not wait for it
                    raise
        return busy

    def flush(self) -> bool:
        """Writes the oldest dirty chunk to the disk; False when there is none. Lock not held; may block."""
        catalog = self._catalog
        with catalog.lock:
            if not catalog.dirty:
                return False
            slot = next(iter(catalog.dirty))
            catalog.acquire(slot)
            meta, before = catalog.index.meta(slot), catalog.index.texts.before(slot)
        location = NOWHERE
        try:
            location = self._disk.write(meta, catalog.extent(slot), sync=False, before=before)
        except StorageError as error:
            log.warning("%s keeps chunk %s in memory only: %s", catalog.node_id, meta.chunk_id.short, error)
        finally:
            with catalog.lock:
                if location != NOWHERE:
                    self._written(slot, location)
                else:
                    catalog.dirty.pop(slot, None)
                    catalog.counters.disk_refused += 1
                catalog.release(slot)
                catalog.lock.notify_all()
        return True

    def make_durable(self, slot: int) -> None:
        """Returns once an acquired chunk would survive a power loss. Lock not held; may block. Raises DiskError."""
        index = self._catalog.index
        with self._catalog.lock:
            meta, extent = index.meta(slot), index.extent[slot]
            on_disk = index.location[slot] != NOWHERE
            before = index.texts.before(slot)
        if on_disk or extent is None:
            self._disk.sync()
            return
        location = self._disk.write(meta, extent, sync=True, before=before)
        with self._catalog.lock:
            self._written(slot, location)

    def promote(self, slot: int) -> Extent | None:
        """Reads an acquired chunk into memory; None where there is no room. One thread reads it, the others wait for
        that. Lock not held; may block. Raises ChunkNotFoundError."""
        catalog, index = self._catalog, self._catalog.index
        with catalog.lock:
            catalog.lock.wait_for(lambda: slot not in self._promoting)
            if (extent := index.extent[slot]) is not None:
                return extent
            try:
                extent = self._memory.reserve(
                    index.size_bytes[slot],
                    before=catalog.in_memory.nearest(index.texts.before(slot)),
                    may_demote_before=False,
                )
            except ArenaFullError:
                return None
            self._promoting.add(slot)
        try:
            self._disk.reads.chunk(slot, list(catalog.arena.views(extent)))
        except BaseException:
            with catalog.lock:
                catalog.arena.free(extent)
            raise
        else:
            with catalog.lock:
                index.extent[slot] = extent
                catalog.counters.promotions += 1
                if index.is_linked(slot):
                    catalog.enter(catalog.in_memory, slot)
            return extent
        finally:
            with catalog.lock:
                self._promoting.discard(slot)
                catalog.lock.notify_all()

    def demote(self) -> None:
        """Frees memory down to the low watermark when it is above the high one, as far as chunks are on disk too.
        Lock not held."""
        if not self._disk.is_present:
            return
        high, low = self._residency.watermarks()
        with self._catalog.lock:
            self._memory.demote(high, low)

    def expire(self, now_s: float) -> bool:
        """Removes chunks whose time is over at unix time `now_s`, unless they are read or leased. Looks at
        REMOVED_CHUNKS at most; True when there are more. Lock not held."""
        catalog = self._catalog
        with catalog.lock:
            catalog.leases.expire()
            catalog.free_rested(REMOVED_CHUNKS)
            for slot in catalog.index.expiries.due(now_s, REMOVED_CHUNKS):
                if not (catalog.is_acquired(slot) or catalog.leases.holds(slot)):
                    catalog.remove(slot)
                    catalog.counters.expired += 1
            return catalog.index.expiries.has_due(now_s)

    def _written(self, slot: int, location: Location) -> None:
        """The chunk is on disk too now; the caller has the lock. Another copy there, or none in the index any more,
        makes this one garbage."""
        catalog = self._catalog
        catalog.dirty.pop(slot, None)
        if catalog.index.is_linked(slot) and catalog.index.location[slot] == NOWHERE:
            catalog.index.location[slot] = location
            catalog.enter(catalog.on_disk, slot)
        elif catalog.store is not None:
            catalog.store.delete(location)
