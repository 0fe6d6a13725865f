"""The disk tier of a storage node: writes, recovers, verifies and deletes chunks on disk, and makes room for them."""

import logging
import threading
from collections import deque
from collections.abc import Iterable

from kvstore_cluster.arena import Extent
from kvstore_cluster.catalog import ChunkCatalog
from kvstore_cluster.disk import Location, RecordMeta, SegmentStore
from kvstore_cluster.disk_reads import DiskReads, LostChunkError, UnreadableChunkError
from kvstore_cluster.eviction.columns import NO_SLOT
from kvstore_cluster.index import NOWHERE
from kvstore_codec.errors import ChunkNotFoundError, DiskFullError, StorageError
from kvstore_codec.identity import ChunkId

log = logging.getLogger(__name__)

_DISK_TRIES = 3


class DiskTier:
    """Chunks in the segment store, on a node that has a disk. Each method states its lock requirements, in the terms
    defined in `catalog.py`."""

    def __init__(self, catalog: ChunkCatalog) -> None:
        self._catalog = catalog
        self.reads = DiskReads(catalog)
        # Deleted chunks without a tombstone on disk yet, and the newest sequence number at their deletion.
        self._deleted: deque[tuple[RecordMeta, int]] = deque()
        self._burying = threading.Lock()  # whoever finds no tombstone to write knows that all are written

    @property
    def is_present(self) -> bool:
        """Whether the node has a disk."""
        return self._catalog.store is not None

    @property
    def error(self) -> str:
        """Why the disk takes no chunks; empty while it does, and without a disk."""
        return "" if self._catalog.store is None else self._catalog.store.error

    @property
    def read_unit_bytes(self) -> int:
        """What the disk reads at least, from an offset that is a multiple of it, bytes. Raises StorageError without a
        disk."""
        return self._store.read_unit_bytes

    def recover(self) -> None:
        """Rebuilds the index from the records on disk. Call without the lock; may block. Raises DiskError."""
        if not self._store.direct:
            log.warning(
                "%s reads and writes its disk through the page cache: O_DIRECT is off or not offered there",
                self._catalog.node_id,
            )
        recovery = self._store.recover(isolated=self._catalog.index.isolated)
        for line in recovery.dropped:
            log.warning("%s: %s", self._catalog.node_id, line)
        with self._catalog.lock:
            self._adopt(recovery.records)

    def write(self, meta: RecordMeta, extent: Extent, *, sync: bool, before: int = NO_SLOT) -> Location:
        """Appends a chunk to the disk. Evicts unprotected chunks from disk to make room, but not `before`, the chunk
        before it in its text. Call without the lock; may block. Raises DiskError."""
        views = list(self._catalog.arena.views(extent))
        tries = _DISK_TRIES
        while True:
            with self._catalog.lock:
                self._make_room(meta.size_bytes, before)
            try:
                return self._store.append(meta, views, sync=sync)
            except DiskFullError:
                # Evicted records take space until their segment is compacted. Where nothing is left to compact, the
                # maintenance thread or another put has just compacted, and another put may have taken the space.
                if not self.compact():
                    tries -= 1
                if not tries:
                    raise

    def sync(self) -> None:
        """Syncs all appended records, so that they survive a power loss. Call without the lock; may block. Raises
        DiskError."""
        self._store.sync()

    def verify(self, slot: int) -> str | None:
        """Verifies the disk copy of an acquired chunk. Returns why it is damaged or unreadable, or None when it is
        sound or absent. Drops a damaged copy. Call without the lock; may block."""
        index = self._catalog.index
        if index.location[slot] == NOWHERE:
            return None
        try:
            self.reads.chunk(slot, [memoryview(bytearray(index.size_bytes[slot]))])
        except (LostChunkError, UnreadableChunkError) as error:
            return str(error)
        except ChunkNotFoundError:  # evicted or deleted in the meantime
            return None
        return None

    def compact(self) -> bool:
        """Runs one compaction step. True when there may be more to do. Call without the lock; may block. Raises
        DiskError."""
        return self._store.compact(self._relocate, self._lost)

    def delete(self, meta: RecordMeta) -> None:
        """Queues a tombstone for a deleted chunk. A restart no longer recovers the chunk once `write_tombstones` has
        written it. Lock held."""
        if self._catalog.store is not None:
            self._deleted.append((meta, self._catalog.store.newest_sequence))

    def delete_record(self, meta: RecordMeta) -> None:
        """Queues a tombstone for a record that was written while its chunk was deleted, unless the chunk has been
        stored again. Lock held."""
        if self._catalog.index.find(meta.chunk_id, meta.encoding, meta.tenant) is None:
            self.delete(meta)

    def write_tombstones(self) -> None:
        """Writes the queued tombstones to disk. Call without the lock; may block. Raises DiskError, and then keeps the
        unwritten tombstones for the next call."""
        if self._catalog.store is None:
            return
        with self._burying:
            while True:
                with self._catalog.lock:
                    if not self._deleted:
                        return
                    meta, sequence = self._deleted[0]
                self._store.forget(meta, sequence)
                with self._catalog.lock:
                    self._deleted.popleft()

    @property
    def _store(self) -> SegmentStore:
        """The segment store. Raises StorageError when the node has no disk."""
        store = self._catalog.store
        if store is None:
            raise StorageError(f"{self._catalog.node_id} has no disk")
        return store

    def _adopt(self, records: Iterable[tuple[RecordMeta, Location]]) -> None:
        """Inserts recovered records into the index. Drops records that the index has no room for. A chunk may come
        before the chunk that precedes it in its text, because compaction moves records; it is linked once that one
        comes."""
        catalog = self._catalog
        waiting: dict[
            tuple[ChunkId, str], list[int]
        ] = {}  # by the chunk before them in their text, and tenant
        refused: list[Location] = []
        for meta, location in records:
            behind = () if meta.behind is None else (meta.behind,)
            before = catalog.index.stands_behind(meta.tenant, meta.number, behind, meta.encoding)
            try:
                slot = catalog.insert(meta, extent=None, location=location, write_back=False, before=before)
            except StorageError as error:
                if not refused:
                    log.warning("%s drops chunks from its disk: %s", catalog.node_id, error)
                refused.append(location)
                continue
            if meta.behind is not None and before == NO_SLOT:
                waiting.setdefault((meta.behind, meta.tenant), []).append(slot)
            for follower in waiting.pop((meta.chunk_id, meta.tenant), ()):
                catalog.link_behind(follower, slot)
        for location in refused:  # only after all records are read
            self._store.delete(location)

    def _make_room(self, size_bytes: int, before: int) -> None:
        """Evicts chunks from disk until a record of `size_bytes` fits. Lock held. Raises DiskFullError, and evicts
        nothing, when all chunks on disk are protected or the beginning of the same text."""
        catalog, store = self._catalog, self._store
        excess_bytes = store.live_bytes + store.record_bytes(size_bytes) - store.capacity_bytes
        if excess_bytes <= 0:
            return
        catalog.leases.expire()
        choice = catalog.choose(
            catalog.on_disk,
            excess_bytes,
            self._record_bytes,
            lambda slot: not catalog.is_protected(slot),
            spared=catalog.on_disk.nearest(before),
        )
        if sum(map(self._record_bytes, choice.victims)) < excess_bytes:
            raise DiskFullError(
                f"the disk of {catalog.node_id} has no room for {size_bytes} bytes: all that is stored in its "
                f"{store.capacity_bytes} bytes is leased, pinned, being read or the beginning of the same text; "
                "give the node more disk"
            )
        for slot in choice.victims:
            catalog.leave_disk(slot)

    def _record_bytes(self, slot: int) -> int:
        return self._store.record_bytes(self._catalog.index.size_bytes[slot])

    def _relocate(self, meta: RecordMeta, old: Location, new: Location) -> bool:
        """Updates the location of a record that compaction moved. False when the index no longer has the record."""
        index = self._catalog.index
        with self._catalog.lock:
            slot = index.find(meta.chunk_id, meta.encoding, meta.tenant)
            if slot is None or index.location[slot] != old:
                return False
            index.location[slot] = new
            return True

    def _lost(self, meta: RecordMeta, location: Location) -> None:
        """Drops the disk copy of a chunk whose record compaction found damaged."""
        index = self._catalog.index
        with self._catalog.lock:
            slot = index.find(meta.chunk_id, meta.encoding, meta.tenant)
            if slot is not None and index.location[slot] == location:
                self._catalog.drop_disk_copy(slot)
