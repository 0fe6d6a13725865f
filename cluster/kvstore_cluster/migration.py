"""Moves chunks between the tiers of a storage node, and removes expired chunks.

A put stores a chunk in memory. The chunk is written to disk before the put is acknowledged, or it is *dirty* until the
maintenance thread *flushes* it to disk. A chunk that is also on disk is *demoted* to free its memory. A chunk read from
disk into memory is *promoted*. A chunk that left both tiers to make room for others is *evicted*; one whose time to
live has passed is *expired* and removed. A reader or writer of a chunk has *acquired* it: its bytes stay in place until
it is released. A *tombstone* is a record on disk that says that a chunk was deleted.
"""

import logging
import time
from collections import Counter

from kvstore_cluster.arena import Extent
from kvstore_cluster.catalog import ChunkCatalog
from kvstore_cluster.disk import Location, RecordMeta
from kvstore_cluster.disk_tier import DiskTier
from kvstore_cluster.index import NOWHERE
from kvstore_cluster.memory_tier import MemoryTier
from kvstore_cluster.residency import Residency
from kvstore_cluster.slices import PAUSE_S, REMOVED_CHUNKS, SLICE_CHUNKS, locked_slice
from kvstore_codec.errors import ArenaFullError, DiskError, StorageError

log = logging.getLogger(__name__)


class Migration:
    """Moves chunks between memory and disk. The maintenance thread calls `step`; puts and reads call the other methods
    for a chunk that they need in the other tier now. Thread-safe. Callers must not hold the lock of the catalog."""

    def __init__(
        self, catalog: ChunkCatalog, memory: MemoryTier, disk: DiskTier, residency: Residency
    ) -> None:
        self._catalog = catalog
        self._memory = memory
        self._disk = disk
        self._residency = residency
        self._promoting: set[int] = set()

    def step(self, now_s: float) -> bool:
        """Runs one round of maintenance, in this order: reports recorded uses to the eviction policies, removes chunks
        that expired by unix time `now_s`, flushes one dirty chunk to disk, demotes, writes tombstones, and runs one
        compaction step. True when there is more to do at once. Call without the lock; may block. Raises DiskError, but
        not while the disk is known to have failed, which the node tells as the disk's error."""
        more = True
        while more:
            with locked_slice(self._catalog.lock, first=False):
                more = self._catalog.flush_touches(SLICE_CHUNKS)
        while self.expire(now_s):
            time.sleep(PAUSE_S)
        busy = self.flush()
        self.demote()
        try:
            self._disk.write_tombstones()
            if self._disk.is_present:
                busy |= self._disk.compact()
        except DiskError:
            if not busy and not self._disk.error:  # a failure does not delay write-back
                raise
        return busy

    def flush(self) -> bool:
        """Writes the oldest dirty chunk to disk. False when no chunk was dirty. A chunk that the disk does not take is
        no longer dirty: it stays in memory only, the counter `disk_refused` counts it, and it is not flushed again.
        Only another put of it can still write it to disk. Call without the lock; may block."""
        catalog = self._catalog
        with catalog.lock:
            if not catalog.dirty:
                return False
            slot = next(iter(catalog.dirty))
            catalog.acquire(slot)
            catalog.writing[slot] += 1
            meta, preceding = catalog.index.meta(slot), catalog.index.texts.before(slot)
        location = NOWHERE
        try:
            location = self._disk.write(meta, catalog.extent(slot), sync=False, before=preceding)
        except StorageError as error:
            log.warning("%s keeps chunk %s in memory only: %s", catalog.node_id, meta.chunk_id.short, error)
        finally:
            with catalog.lock:
                if location != NOWHERE:
                    self._written(slot, meta, location)
                else:
                    catalog.dirty.pop(slot, None)
                    catalog.counters.disk_refused += 1
                catalog.writing -= Counter((slot,))
                catalog.release(slot)
                catalog.lock.notify_all()
        return True

    def make_durable(self, slot: int) -> None:
        """Syncs an acquired chunk to disk, so that it survives a power loss. Call without the lock; may block. Raises
        DiskError."""
        index = self._catalog.index
        with self._catalog.lock:
            meta, extent = index.meta(slot), index.extent[slot]
            on_disk = index.location[slot] != NOWHERE
            preceding = index.texts.before(slot)
            self._catalog.writing[slot] += 1
        try:
            if on_disk or extent is None:
                self._disk.sync()
                return
            location = self._disk.write(meta, extent, sync=True, before=preceding)
            with self._catalog.lock:
                self._written(slot, meta, location)
        finally:
            with self._catalog.lock:
                self._catalog.writing -= Counter((slot,))

    def promote(self, slot: int) -> Extent | None:
        """Reads an acquired chunk from disk into memory. None when memory has no room. One thread reads the chunk, and
        other callers wait for that read. Call without the lock; may block. Raises ChunkNotFoundError."""
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
        """Demotes chunks down to the low watermark when memory use is above the high one. Chunks that are not on disk
        stay. Call without the lock."""
        if not self._disk.is_present:
            return
        high, low = self._residency.watermarks()
        with self._catalog.lock:
            self._memory.demote(high, low)

    def expire(self, now_s: float) -> bool:
        """Removes chunks that expired by unix time `now_s` and are neither acquired nor leased. Examines at most
        REMOVED_CHUNKS expired chunks. True when some were not examined yet; those that are acquired or leased count as
        examined, and later calls examine them again. Call without the lock."""
        catalog = self._catalog
        with catalog.lock:
            catalog.leases.expire()
            catalog.free_unleased(REMOVED_CHUNKS)
            for slot in catalog.index.expiries.due(now_s, REMOVED_CHUNKS):
                if not (catalog.is_acquired(slot) or catalog.leases.holds(slot)):
                    catalog.remove(slot)
                    catalog.counters.expired += 1
            return catalog.index.expiries.has_due(now_s)

    def _written(self, slot: int, meta: RecordMeta, location: Location) -> None:
        """Records that the chunk is on disk. Lock held. Deletes the new record if the chunk already has a disk copy or
        is no longer in the index."""
        catalog = self._catalog
        catalog.dirty.pop(slot, None)
        if catalog.index.is_linked(slot) and catalog.index.location[slot] == NOWHERE:
            catalog.index.location[slot] = location
            catalog.enter(catalog.on_disk, slot)
        elif catalog.store is not None:
            catalog.store.delete(location)
            # Deleted during the write, which its tombstone may not cover.
            if not catalog.index.is_linked(slot):
                self._disk.delete_record(meta)
