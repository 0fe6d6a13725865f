"""Puts of chunks into a storage node: reserves memory for a put, and makes a written chunk visible."""

from collections.abc import Callable
from dataclasses import replace

from blake3 import blake3
from cachetools import TTLCache

from kvstore_cluster.arena import Extent
from kvstore_cluster.catalog import ChunkCatalog
from kvstore_cluster.disk import Location, RecordMeta
from kvstore_cluster.disk_tier import DiskTier
from kvstore_cluster.durability import Durability
from kvstore_cluster.eviction.columns import NO_SLOT
from kvstore_cluster.forgotten import Forgotten
from kvstore_cluster.index import MAX_CHUNK_BYTES, NOWHERE
from kvstore_cluster.memory_tier import MemoryTier
from kvstore_cluster.migration import Migration
from kvstore_cluster.names import MAX_TENANT_BYTES, Description
from kvstore_cluster.put import PendingPut, PutOptions
from kvstore_cluster.reader import ChunkBytes
from kvstore_cluster.tallies import EvictionCause
from kvstore_codec.encoding import Encoding
from kvstore_codec.errors import (
    ChunkNotFoundError,
    ChunkTooLargeError,
    DiskError,
    ForgottenTenantError,
    NodeDrainingError,
    NotDurableError,
    PutStateError,
    StorageError,
    TextTooLongError,
)
from kvstore_codec.identity import ChunkId

# Longest wait of a put for memory of dirty chunks, which is freed once they are written to disk.
FLUSH_PATIENCE_S = 2.0
# Number and lifetime of remembered chunks that were refused for their text's length. Clients send the chunks that
# follow a refused one shortly after it.
_MOST_CUT, _CUT_S = 4096, 60.0


class Intake:
    """Puts of a node. Changes metadata with the lock of the catalog held, and writes and verifies bytes without it.
    Thread-safe. `durability` is the default for puts that do not specify one. `clock` returns unix time, and is used
    for TTLs."""

    def __init__(
        self,
        catalog: ChunkCatalog,
        memory: MemoryTier,
        disk: DiskTier,
        migration: Migration,
        stored: ChunkBytes,
        durability: Durability,
        clock: Callable[[], float],
    ) -> None:
        self.draining = False
        """While this is set, puts are rejected."""
        self.forgotten = Forgotten()
        """The forgotten tenants. Copies of their chunks are rejected that a node sends which has not applied that."""
        self._forgotten_puts: set[PendingPut] = set()  # begun before their tenant was forgotten
        self._writing: set[PendingPut] = set()  # may write to disk
        self._catalog = catalog
        self._memory = memory
        self._disk = disk
        self._migration = migration
        self._stored = stored
        self._durability = durability
        self._clock = clock
        self._arena = catalog.arena
        self._index = catalog.index
        self._lock = catalog.lock
        self._counters = catalog.counters
        self._node_id = catalog.node_id
        self._pending: set[PendingPut] = set()
        # Recently refused chunks whose text was cut before them, by tenant and chunk.
        self._cut: TTLCache[tuple[str, ChunkId], None] = TTLCache(_MOST_CUT, _CUT_S)

    def begin(
        self,
        chunk_id: ChunkId,
        encoding: str,
        size_bytes: int,
        calibration: bytes | None,
        options: PutOptions,
    ) -> PendingPut | None:
        """Implements `StorageNode.begin_put`. Call without the lock; may block."""
        durable = self._asked(options) is Durability.DURABLE
        try:
            Encoding.parse(encoding)
            self._require_possible(chunk_id, size_bytes, options.tenant, durable=durable)
            with self._lock:
                self._require_current(chunk_id, options)
                slot = self._index.find_alive(chunk_id, encoding, self._clock(), options.tenant)
                if (
                    slot is None
                    or self._index.calibration(slot) != calibration
                    or not self._catalog.is_readable(slot)
                    or self._catalog.is_leaving(slot)
                    or self._ends_much_sooner(slot, options.ttl_s)
                ):
                    return self._reserve(chunk_id, encoding, size_bytes, options)
                if not options.refused:
                    self._use_again(slot, encoding, options)
                self._catalog.acquire(slot)
            try:
                if options.refused:
                    refused = self._is_refused(slot, options.refused)
                    with self._lock:
                        if refused or not self._index.is_linked(slot):
                            return self._reserve(chunk_id, encoding, size_bytes, options, refused=slot)
                        self._use_again(slot, encoding, options)
                if durable:
                    self._make_durable(slot)
            finally:
                with self._lock:
                    self._catalog.release(slot)
        except Exception as error:
            with self._lock:
                self._reject(error)
            raise
        return None

    def extents(self) -> list[Extent]:
        """Memory of all pending puts. Lock held."""
        return [put.extent for put in self._pending]

    def forget(self, forgotten: Forgotten, concerns: Callable[[str], bool]) -> None:
        """Replaces the forgotten tenants, and rejects the pending puts of tenants for which `concerns` is true. Lock
        held."""
        self.forgotten = forgotten
        self._forgotten_puts |= {put for put in self._pending if concerns(put.options.tenant)}

    @property
    def is_forgetting(self) -> bool:
        """Whether a put of a tenant that `forget` named may be writing to disk. Lock held."""
        return bool(self._forgotten_puts & self._writing)

    def _asked(self, options: PutOptions) -> Durability:
        return self._durability if options.durability is Durability.DEFAULT else options.durability

    def _use_again(self, slot: int, encoding: str, options: PutOptions) -> None:
        """Records the put of a stored chunk as a use of it. Lock held."""
        # A tenant's put must not link chunks of another tenant.
        own = self._index.tenant(slot) == options.tenant
        self._catalog.put_again(slot, self._before(encoding, options) if own else NO_SLOT)

    def _is_refused(self, slot: int, refused: frozenset[bytes]) -> bool:
        """Whether the caller of a put has refused the acquired chunk. Call without the lock; may block."""
        try:
            return blake3(self._stored.header(slot)).digest() in refused
        except ChunkNotFoundError:  # lost by its disk; then nothing is stored
            return True

    def _reserve(
        self, chunk_id: ChunkId, encoding: str, size_bytes: int, options: PutOptions, refused: int = NO_SLOT
    ) -> PendingPut:
        """Reserves memory and quota for a put, which replaces the chunk in the acquired slot `refused`. Lock held."""
        self._require_open(chunk_id)
        catalog, tenant = self._catalog, options.tenant
        before = self._before(encoding, options)
        try:
            self._require_beginning(chunk_id, before, options)
            catalog.over_quota(tenant, size_bytes, before)  # raises before anything is evicted
            extent = self._memory.reserve(size_bytes, before=before, patience_s=FLUSH_PATIENCE_S)
            before = self._before(encoding, options)  # `reserve` may have released the lock while it waited
            try:
                victims = catalog.over_quota(tenant, size_bytes, before)
            except StorageError:
                self._arena.free(extent)
                raise
        except TextTooLongError:
            self._counters.texts_cut += 1
            self._cut[tenant, chunk_id] = None
            raise
        self._cut.pop((tenant, chunk_id), None)
        for slot in victims:
            catalog.remove(slot)
        catalog.count_evictions(EvictionCause.QUOTA, len(victims))
        if before != NO_SLOT:
            catalog.acquire(before)  # keeps the preceding chunk until the put ends
        if refused != NO_SLOT:
            catalog.acquire(refused)  # so that no other chunk gets its slot
        put = PendingPut(
            self._arena,
            extent,
            chunk_id,
            encoding,
            options,
            before=before,
            refused=refused,
            accept=self._accept,
            drop=self._drop,
        )
        self._pending.add(put)
        catalog.quotas.reserve(tenant, size_bytes)
        return put

    def _before(self, encoding: str, options: PutOptions) -> int:
        """Slot of the nearest stored chunk before the new one in its text. NO_SLOT when none is known."""
        return self._index.stands_behind(options.tenant, options.number, options.behind, encoding)

    def _require_beginning(self, chunk_id: ChunkId, before: int, options: PutOptions) -> None:
        """Raises TextTooLongError for a chunk that follows a chunk recently refused with that error."""
        if before == NO_SLOT and any((options.tenant, behind) in self._cut for behind in options.behind):
            raise TextTooLongError(
                f"chunk {chunk_id.short} is not stored: {self._node_id} has just refused the chunk before it in its "
                "text, and keeps only the beginning of the text; give the node more memory"
            )

    def _require_open(self, chunk_id: ChunkId) -> None:
        if self.draining:
            raise NodeDrainingError(
                f"chunk {chunk_id.short} is not stored: {self._node_id} is draining; its owners are other nodes now"
            )

    def _require_current(self, chunk_id: ChunkId, options: PutOptions, *, kept: bool = True) -> None:
        """Raises ForgottenTenantError for a copy that another node sends which has not heard that the tenant was
        forgotten, and if `kept` is false. Lock held."""
        copied_at = options.copied_at
        if not kept or (copied_at is not None and copied_at < self.forgotten.generation_of(options.tenant)):
            raise ForgottenTenantError(
                f"chunk {chunk_id.short} is not stored: its tenant was forgotten in the meantime"
            )

    def _end(self, put: PendingPut) -> None:
        """Ends the reservation of a put. Lock held."""
        self._pending.remove(put)
        self._forgotten_puts.discard(put)
        self._catalog.quotas.reserve(put.options.tenant, -put.extent.size_bytes)
        self._counters.bytes_in += put.written_bytes

    def _release_slots(self, put: PendingPut) -> None:
        """Releases the preceding and the refused chunk, as the last step of a put. Lock held."""
        for slot in (put.before, put.refused):
            if slot != NO_SLOT:
                self._catalog.release(slot)

    def _ends_much_sooner(self, slot: int, ttl_s: float) -> bool:
        """Whether the stored chunk expires before half of `ttl_s` has passed. A `ttl_s` of 0 never expires."""
        expires_at_s = self._index.expires_at_s(slot)
        return expires_at_s > 0 and (ttl_s == 0 or expires_at_s - self._clock() < ttl_s / 2)

    def _require_possible(self, chunk_id: ChunkId, size_bytes: int, tenant: str, *, durable: bool) -> None:
        if size_bytes < 1:
            raise PutStateError(f"chunk {chunk_id.short} was announced with a size of {size_bytes} bytes")
        if len(tenant.encode()) > MAX_TENANT_BYTES:
            raise PutStateError(
                f"the tenant of chunk {chunk_id.short} has a name of more than {MAX_TENANT_BYTES} bytes"
            )
        if size_bytes > MAX_CHUNK_BYTES:
            raise ChunkTooLargeError(
                f"chunk {chunk_id.short} has {size_bytes} bytes; a chunk has at most {MAX_CHUNK_BYTES}"
            )
        if size_bytes > self._arena.capacity_bytes:
            raise ChunkTooLargeError(
                f"chunk {chunk_id.short} has {size_bytes} bytes, but {self._node_id} holds only "
                f"{self._arena.capacity_bytes} bytes in all; give the node more memory"
            )
        if durable and not self._disk.is_present:
            raise NotDurableError(
                f"chunk {chunk_id.short} cannot be kept durably: {self._node_id} has no disk; start it with --disk"
            )

    def _make_durable(self, slot: int) -> None:
        """Syncs an acquired chunk to disk, so that it survives a power loss. Raises NotDurableError."""
        try:
            self._migration.make_durable(slot)
        except DiskError as error:
            raise NotDurableError(str(error)) from error

    def _accept(self, put: PendingPut, meta: RecordMeta) -> bool:
        """Makes a verified chunk visible, after writing it to disk if its durability requires that. False when another
        put of the same chunk was first. An exception revokes the put."""
        if put.options.ttl_s > 0:
            meta = replace(meta, expires_at_s=self._clock() + put.options.ttl_s)
        try:
            description = self._admit(put, meta)
        except BaseException as error:
            self._drop(put, rejected=error)
            raise
        try:
            try:
                if put.before != NO_SLOT:
                    meta = replace(meta, behind=self._index.chunk_id(put.before))
                location = self._write_through(put, meta)
            except BaseException as error:
                self._drop(put, rejected=error)
                raise
            return self._place(put, meta, location)
        finally:
            with self._lock:
                self._index.dismiss(description)
                self._writing.discard(put)

    def _admit(self, put: PendingPut, meta: RecordMeta) -> Description:
        """Ensures that the chunk can be inserted at any time until `dismiss`. Raises StorageError, NodeDrainingError,
        and ForgottenTenantError for a put that began before its tenant was forgotten: it writes nothing to disk."""
        with self._lock:
            self._require_open(meta.chunk_id)
            self._require_current(meta.chunk_id, put.options, kept=put not in self._forgotten_puts)
            description = self._index.admit(meta)
            self._writing.add(put)
            return description

    def _place(self, put: PendingPut, meta: RecordMeta, location: Location) -> bool:
        """Inserts an admitted chunk into the catalog, and ends its put. False when another put was first. Raises
        ForgottenTenantError, and then the put has ended, too."""
        with self._lock:
            kept = put not in self._forgotten_puts
            self._end(put)
            try:
                self._require_current(meta.chunk_id, put.options, kept=kept)
            except ForgottenTenantError as error:
                self._take_back(put, location)
                if location != NOWHERE:
                    self._disk.delete_record(meta)
                self._reject(error)
                raise
            stored = self._index.find(meta.chunk_id, meta.encoding, meta.tenant)
            if (
                stored is not None
                and stored != put.refused
                and not self._replaces(meta, location, stored, put.options.ttl_s)
            ):
                self._take_back(put, location)
                return False
            refused = location == NOWHERE and self._asked(put.options) is not Durability.MEMORY
            self._catalog.insert(
                meta,
                extent=put.extent,
                location=location,
                write_back=self._disk.is_present,  # a chunk that the disk refused is tried once more
                before=self._before(meta.encoding, put.options),  # may have been replaced since the put began
                replaced=NO_SLOT if stored is None else stored,
            )
            self._release_slots(put)
            self._counters.disk_refused += refused and self._disk.is_present
            self._counters.puts += 1
            self._catalog.tallies.written(meta.encoding, meta.size_bytes)
            return True

    def _take_back(self, put: PendingPut, location: Location) -> None:
        """Removes what an ended put has written. Lock held."""
        self._arena.free(put.extent)
        if self._catalog.store is not None and location != NOWHERE:
            self._catalog.store.delete(location)
        self._release_slots(put)

    def _write_through(self, put: PendingPut, meta: RecordMeta) -> Location:
        """Writes the chunk to disk if its durability requires that, and returns its location. NOWHERE when it is not
        written now, or the disk refused a chunk that need not be durable. Raises NotDurableError."""
        asked = self._asked(put.options)
        if not self._disk.is_present or asked is Durability.MEMORY:
            return NOWHERE
        try:
            sync = asked is Durability.DURABLE
            return self._disk.write(meta, put.extent, sync=sync, before=put.before)
        except DiskError as error:
            if asked is Durability.DURABLE:
                raise NotDurableError(str(error)) from error
            return NOWHERE

    def _replaces(self, meta: RecordMeta, location: Location, stored: int, ttl_s: float) -> bool:
        """Whether a new chunk replaces the stored one, because the stored one has another calibration, cannot be read,
        expires sooner, or is not on disk while the new one is. Two workers may encode the same chunk to different
        bytes, so the tiers must not hold a mix of both."""
        return (
            self._index.calibration(stored) != meta.calibration
            or not self._catalog.is_readable(stored)
            or self._catalog.is_leaving(stored)
            or not self._index.is_alive(stored, self._clock())
            or self._ends_much_sooner(stored, ttl_s)
            or (location != NOWHERE and self._index.location[stored] == NOWHERE)
        )

    def _drop(self, put: PendingPut, *, rejected: BaseException | None) -> None:
        """Revokes a put: frees its memory and quota. `rejected` is the error for which the node refused the chunk."""
        with self._lock:
            self._end(put)
            self._arena.free(put.extent)
            if rejected is not None:
                self._reject(rejected)
            self._release_slots(put)

    def _reject(self, error: BaseException) -> None:
        """Counts a refused put. Lock held."""
        self._counters.put_rejected += 1
        self._catalog.tallies.refused(error)
