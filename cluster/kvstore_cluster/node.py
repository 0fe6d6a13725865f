"""A storage node: stores chunks in memory and on disk, finds them by content, evicts them by value, and protects them
by leases and pins. Uses no network and no Ray."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, contextmanager

from kvstore_cluster.arena import Arena
from kvstore_cluster.catalog import ChunkCatalog
from kvstore_cluster.directives import Directives
from kvstore_cluster.disk import SegmentStore
from kvstore_cluster.disk_tier import DiskTier
from kvstore_cluster.durability import Durability
from kvstore_cluster.events.changes import TierChanges
from kvstore_cluster.eviction import DEFAULT_POLICY, POLICIES, EvictionPolicy
from kvstore_cluster.forgotten import Forgotten
from kvstore_cluster.frame_plan import FrameRange
from kvstore_cluster.frame_reads import FrameRead, FrameReadOptions, FrameReads
from kvstore_cluster.intake import Intake
from kvstore_cluster.integrity import check_integrity
from kvstore_cluster.leases import LeaseId, LeaseTable
from kvstore_cluster.listing import MAX_LISTED, list_variants
from kvstore_cluster.lookup import ChunkSearch, LookupRequest, LookupResult
from kvstore_cluster.memory_tier import MemoryTier
from kvstore_cluster.migration import Migration
from kvstore_cluster.put import PendingPut, PutOptions
from kvstore_cluster.reader import ChunkBytes, ChunkReader
from kvstore_cluster.residency import Residency
from kvstore_cluster.slices import REMOVED_CHUNKS, SLICE_CHUNKS, locked_slice
from kvstore_cluster.stats import NodeStats
from kvstore_cluster.stored import StoredVariant
from kvstore_cluster.tallies import Tier, by_key_samples
from kvstore_cluster.tenant_removal import TenantRemoval
from kvstore_cluster.tenant_usage import TenantUsage, tenant_usage
from kvstore_cluster.uses import Uses
from kvstore_codec.errors import ChunkNotFoundError
from kvstore_codec.identity import ChunkId


class StorageNode:
    """A storage node without its network service.

    Thread-safe. One lock guards the metadata; bytes are written, verified and read without it. Callers hold no lock.
    `lookup`, `begin_put`, `open`, `delete`, `verify`, `maintain` and `close` may block on the disk.

    With a `store`, chunks are also kept on disk, and the node recovers the chunks that are already there. `durability`
    is the default for puts that do not specify one. An `isolated` node keeps tenants apart: an operation finds only the
    chunks of the tenant that it names, and chunks of several tenants may have the same id. On other nodes the tenant of
    a chunk only says whose quota it counts against, and operations find the chunks of all tenants. `policy` creates the
    eviction policy of each tier. `clock` returns unix time, and is used for TTLs. `frame_reads` says how single frames
    are read from disk. With `events` the node remembers the chunks that enter or leave a tier.
    """

    def __init__(
        self,
        node_id: str,
        arena: Arena,
        *,
        store: SegmentStore | None = None,
        durability: Durability = Durability.RELAXED,
        policy: Callable[[], EvictionPolicy] = POLICIES[DEFAULT_POLICY],
        leases: LeaseTable[int] | None = None,
        clock: Callable[[], float] = time.time,
        residency: Residency = Residency(),  # noqa: B008 (has no state)
        frame_reads: FrameReadOptions = FrameReadOptions(),  # noqa: B008 (frozen)
        isolated: bool = False,
        events: bool = False,
    ) -> None:
        self.node_id = node_id
        self._clock = clock
        self._leases = LeaseTable[int]() if leases is None else leases
        self._catalog = catalog = ChunkCatalog(node_id, arena, store, policy, self._leases, isolated=isolated)
        self._index, self._lock, self._counters = catalog.index, catalog.lock, catalog.counters
        self._memory, self._disk = MemoryTier(catalog), DiskTier(catalog)
        self._migration = Migration(catalog, self._memory, self._disk, residency)
        self._stored = ChunkBytes(catalog, self._disk, self._migration, residency)
        self._frames = FrameReads(catalog, self._stored, self._disk, self._acquire, frame_reads)
        self._uses = Uses(catalog)
        self._directives = Directives(catalog)
        if events:
            catalog.changes = TierChanges(catalog.index, catalog.lock)
        self._intake = Intake(
            catalog, self._memory, self._disk, self._migration, self._stored, durability, clock
        )
        if store is not None:
            self._disk.recover()
        self._removal = TenantRemoval(catalog, self._disk, self._intake)

    @property
    def isolated(self) -> bool:
        """Whether the node keeps tenants apart."""
        return self._index.isolated

    @property
    def changes(self) -> TierChanges | None:
        """The chunks that entered or left a tier, on a node with `events`."""
        return self._catalog.changes

    def lookup(
        self, request: LookupRequest, proceed: Callable[[int], object] = lambda _header_bytes: None
    ) -> LookupResult:
        """Looks up the chunks of a request, and returns one answer for each, in order.

        Holds the lock for SLICE_CHUNKS chunks at a time. Between slices it calls `proceed` without the lock, with the
        size of the headers found so far in bytes. An exception from `proceed` ends the lookup. Raises StorageError when
        the headers of one encoding of each chunk exceed `max_header_bytes`. After an exception nothing is leased.
        """
        lease_s, peek, use_follows = request.lease_s, request.peek, request.use_follows
        search = ChunkSearch(self._catalog, self._stored, request, self._clock())
        lease_id: LeaseId | None = None
        first_leased = 0  # index into `search.hits`
        try:
            for begin in range(0, len(request.chunks), SLICE_CHUNKS):
                if begin:
                    proceed(search.header_bytes)
                with self._slice(begin):
                    found = search.find(begin)
                    self._leases.expire()
                    if found and lease_s > 0:
                        lease = self._leases.cover(lease_id, found, lease_s, request.tenant)
                        if (
                            lease != lease_id
                        ):  # the first lease, or a new one because the previous lease has ended
                            lease_id, first_leased = lease, len(search.hits) - len(found)
            if use_follows:
                if lease_id is not None:
                    with self._lock:
                        self._leases.expect_use(lease_id, search.findings(first_leased))
            elif not peek:
                self._uses.touch(search.hits)
            if not peek:
                self._uses.count(search, used=not use_follows)
            search.read_headers(proceed)
        except BaseException:
            with self._lock:
                search.release()
                if lease_id is not None:
                    self._leases.release(lease_id)
            raise
        return LookupResult(search.answers, lease_id)

    def use(self, lease_id: LeaseId, used: bytes, tokens: int, tenant: str | None = None) -> bool:
        """Records which answers of a lookup with `use_follows` its caller uses: bit i % 8 of byte i / 8 of `used`
        stands for answer i. `tokens` is the number of tokens in the used answers. Counts one use of each used chunk,
        and ends the lease on the others. False when the lease has ended, its use was recorded before, or it belongs to
        another tenant than `tenant`."""
        return self._uses.report(lease_id, used, tokens, tenant)

    def begin_put(
        self,
        chunk_id: ChunkId,
        encoding: str,
        size_bytes: int,
        calibration: bytes | None = None,
        options: PutOptions = PutOptions(),  # noqa: B008 (frozen)
    ) -> PendingPut | None:
        """Reserves memory for a chunk, and evicts unprotected chunks to make room. Returns None when the chunk is
        already stored with the requested durability and does not expire much sooner. A stored chunk that was encoded
        with another `calibration` (a digest) is replaced, because the client that puts the new one could not decode it.

        The caller must end the put with `commit` or `revoke`. Raises UnknownEncodingError, PutStateError for an empty
        chunk, ChunkTooLargeError, ArenaFullError, TextTooLongError, OverQuotaError, NotDurableError, NodeDrainingError.
        In these cases nothing is reserved and nothing is evicted.
        """
        return self._intake.begin(chunk_id, encoding, size_bytes, calibration, options)

    @contextmanager
    def open(
        self, chunk_id: ChunkId, encoding: str, *, tenant: str = "", peek: bool = False
    ) -> Iterator[ChunkReader]:
        """Opens a reader of the chunk's frames. Views of memory stay valid until the `with` block ends, even if the
        chunk is deleted before that. Counts as a use of the chunk, except with `peek` and except for a leased chunk,
        whose lookup has counted the use. Raises ChunkNotFoundError."""
        slot = self._acquire(chunk_id, encoding, tenant, peek=peek)
        reader = ChunkReader(self._stored, slot, self._index.size_bytes[slot])
        tier = Tier.DISK if self._index.extent[slot] is None else Tier.MEMORY
        try:
            yield reader
        finally:
            with self._lock:
                self._counters.reads += reader.ranges_read
                self._catalog.count_served(slot, tier, reader.bytes_read)
                self._catalog.release(slot)

    def read_frames(
        self,
        chunks: Sequence[ChunkId],
        encodings: Sequence[str],
        ranges: Sequence[FrameRange],
        tenant: str = "",
    ) -> FrameRead:
        """Opens a reader of ranges of frames of many chunks. It reads several from disk at once, and promotes no chunk.
        Each chunk counts as used, as in `open`."""
        return FrameRead(self._frames, chunks, encodings, ranges, tenant)

    def renew_lease(self, lease_id: LeaseId, lease_s: float, tenant: str | None = None) -> bool:
        """Extends the lease to `lease_s` seconds from now. False when it has ended, or belongs to another tenant than
        `tenant`."""
        with self._lock:
            return self._leases.belongs_to(lease_id, tenant) and self._leases.renew(lease_id, lease_s)

    def release_lease(self, lease_id: LeaseId, tenant: str | None = None) -> bool:
        """Ends the lease. False when it has already ended, or belongs to another tenant than `tenant`."""
        with self._lock:
            return self._leases.belongs_to(lease_id, tenant) and self._leases.release(lease_id)

    def delete(self, chunks: Sequence[ChunkId], tenant: str = "") -> int:
        """Removes every encoding of these chunks, even if leased or pinned, and returns the number of removed variants.
        A restart does not recover them. Memory that is being read is freed when the last reader releases it."""
        deleted = 0
        for begin in range(0, len(chunks), REMOVED_CHUNKS):
            with self._slice(begin):
                for chunk_id in chunks[begin : begin + REMOVED_CHUNKS]:
                    for slot in list(self._index.variants(chunk_id, tenant)):
                        self._disk.delete(self._index.meta(slot))
                        self._catalog.remove(slot)
                        self._counters.deletes += 1
                        deleted += 1
        self._disk.write_tombstones()
        return deleted

    def report(self, chunks: Sequence[ChunkId], scores: Sequence[float], tenant: str = "") -> None:
        """Records the share of attention, 0 to 1, that a model of `tenant` paid to each chunk. Ignores unknown chunks
        and those that other tenants stored."""
        for begin in range(0, len(chunks), SLICE_CHUNKS):
            end = begin + SLICE_CHUNKS
            with self._slice(begin):
                for chunk_id, score in zip(chunks[begin:end], scores[begin:end], strict=True):
                    for slot in self._index.variants(chunk_id, tenant):
                        if self._index.tenant(slot) == tenant:
                            self._catalog.report(slot, score)

    def set_pins(self, pins: Mapping[str, Set[ChunkId]]) -> None:
        """Replaces the sets of pinned chunks, which are never evicted, by tenant. They may name chunks that are not
        stored yet. On a node that does not keep tenants apart, only the set of the default tenant applies."""
        self._directives.set_pins(pins)

    def set_quotas(self, limits: Mapping[str, int]) -> None:
        """Replaces the quotas: the bytes that each tenant may store on this node. Other tenants have no limit."""
        self._directives.set_quotas(limits)

    def forget(self, order: Forgotten | None) -> None:
        """Removes all chunks of forgotten tenants that were stored before this call, even if leased or pinned, and
        rejects their puts in progress. A restart recovers none of them. Chunks that these tenants store later are
        kept. Call it with None from time to time, as `TenantRemoval.apply` says. May block."""
        self._removal.apply(order)

    @property
    def forgotten_generation(self) -> int:
        """The newest forgetting that is applied, 0 for none."""
        return self._removal.generation

    def usage(self, tenant: str | None = None) -> dict[str, TenantUsage]:
        """What each tenant stores, or only one of them. Examines every chunk."""
        return tenant_usage(self._catalog, tenant)

    def set_draining(self, draining: bool) -> None:
        """Starts or ends draining. A draining node rejects puts, so that the set of chunks to move away cannot grow."""
        with self._lock:
            self._intake.draining = draining

    def list(
        self,
        cursor: int = 0,
        limit: int = MAX_LISTED,
        *,
        content_prefix: bytes = b"",
        tenant: str | None = None,
    ) -> tuple[list[StoredVariant], int]:
        """Returns a page of up to `limit` stored variants, and the cursor of the next page, 0 after the last one. The
        first page has cursor 0. Variants stored or removed between pages may or may not be listed."""
        return list_variants(self._catalog, cursor, limit, content_prefix, tenant, self._clock())

    def verify(self, chunk_id: ChunkId, encoding: str, tenant: str = "") -> str | None:
        """Verifies a variant in each tier that has it. Returns why it is damaged or unreadable, or None when it is
        sound or not stored. Drops a damaged copy, and the chunk when no other copy is left."""
        with self._lock:
            slot = self._index.find(chunk_id, encoding, tenant)
            if slot is None:
                return None
            self._catalog.acquire(slot)
        try:
            return self._memory.verify(slot) or self._disk.verify(slot)
        finally:
            with self._lock:
                self._catalog.release(slot)

    def stats(self) -> NodeStats:
        with self._lock:
            self._leases.expire()
            catalog, store = self._catalog, self._catalog.store
            return NodeStats(
                self.node_id,
                chunks=len(self._index),
                bytes_used=catalog.arena.used_bytes,
                bytes_limit=catalog.arena.capacity_bytes,
                leases=len(self._leases),
                counters=self._counters.as_dict(),
                gauges={
                    "memory_chunks": len(catalog.in_memory),
                    "disk_chunks": len(catalog.on_disk),
                    "disk_unreadable": len(catalog.unreadable),
                    "disk_direct": int(store is not None and store.direct),
                    "disk_read_Bps": self._disk.reads.bytes_per_s,
                    "disk_bytes_used": store.live_bytes if store else 0,
                    "disk_bytes_limit": store.capacity_bytes if store else 0,
                    "pinned": len(catalog.pinned),
                    "dirty": len(catalog.dirty),
                }
                | ({} if self.changes is None else {"events_overflows": self.changes.overflows}),
                disk_error=self._disk.error,
                samples=(
                    *catalog.tallies.samples(catalog.quotas.used_bytes, catalog.quotas.limits_bytes),
                    *(by_key_samples(store.chunks_by_key) if store else ()),
                ),
            )

    def maintain(self) -> bool:
        """Runs one round of maintenance, as `Migration.step` describes. Call without the lock; may block."""
        return self._migration.step(self._clock())

    def wait_for_work(self, timeout_s: float) -> None:
        """Waits until a chunk is dirty, for at most `timeout_s`."""
        with self._lock:
            self._lock.wait_for(lambda: self._catalog.dirty, timeout_s)

    def close(self) -> None:
        """Writes dirty chunks to disk and closes the disk. No put or read may be in progress."""
        self._frames.close()
        if self._catalog.store is not None:
            while self._migration.flush():
                pass
            self._catalog.store.close()

    def check_integrity(self) -> None:
        """Raises StorageError unless memory, index, eviction orders, quotas and text links agree. For tests: it
        examines every chunk with the lock held."""
        with self._lock:
            check_integrity(self._catalog, self._intake.extents())

    def _acquire(self, chunk_id: ChunkId, encoding: str, tenant: str = "", *, peek: bool = False) -> int:
        """Acquires a stored chunk, counts its use as `open` says, and returns its slot. Raises ChunkNotFoundError."""
        with self._lock:
            slot = self._index.find_alive(chunk_id, encoding, self._clock(), tenant)
            if slot is None:
                raise ChunkNotFoundError(
                    f"chunk {chunk_id.short} is not stored as {encoding} on {self.node_id}"
                )
            if not (peek or self._leases.holds(slot)):
                self._catalog.touch([slot])
            self._catalog.acquire(slot)
        return slot

    def _slice(self, begin: int) -> AbstractContextManager[None]:
        return locked_slice(self._lock, first=not begin)
