"""A storage node: chunks in memory and on disk, found by content, kept by worth, protected by leases and pins. No
network, no Ray."""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice

from cachetools import TTLCache

from kvstore_cluster.arena import Arena
from kvstore_cluster.disk import Location, RecordMeta, SegmentStore
from kvstore_cluster.durability import Durability
from kvstore_cluster.eviction import DEFAULT_POLICY, POLICIES, EvictionPolicy
from kvstore_cluster.eviction.columns import NO_SLOT
from kvstore_cluster.index import MAX_CHUNK_BYTES, NOWHERE, ChunkName
from kvstore_cluster.leases import LeaseId, LeaseTable
from kvstore_cluster.lookup import PAUSE_S, SLICE_CHUNKS, ChunkSearch, LookupResult
from kvstore_cluster.put import PendingPut, PutOptions
from kvstore_cluster.reader import ChunkReader
from kvstore_cluster.stats import NodeCounters, NodeStats
from kvstore_cluster.stored import StoredVariant
from kvstore_cluster.tiers import FLUSH_PATIENCE_S, Tiers
from kvstore_codec.encoding import Encoding
from kvstore_codec.errors import (
    ChunkNotFoundError,
    ChunkTooLargeError,
    ConfigurationError,
    DiskError,
    NodeDrainingError,
    NotDurableError,
    PutStateError,
    StorageError,
    TextTooLongError,
)
from kvstore_codec.identity import ChunkId

log = logging.getLogger(__name__)

MAX_LISTED = 4096
MAX_TENANT_BYTES = 255
MOST_BEHIND = 16


# Texts that were cut lately: those who put them have the rest on its way.
_MOST_CUT, _CUT_S = 4096, 60.0
_MOST_TOKENS = 1 << 16  # of a chunk, whatever a client says


class StorageNode:
    """Thread-safe. One lock guards the books; bytes are written, verified and read outside it.

    With a `store` chunks are kept on disk too, and those that are there already are found again. `durability` is what a
    put gets that does not say; `policy` makes the eviction policy of each tier. `clock` gives unix time, for TTLs.
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
    ) -> None:
        self.node_id = node_id
        self._arena = arena
        self._store = store
        self._durability = durability
        self._clock = clock
        self._counters = NodeCounters()
        self._leases = LeaseTable[int]() if leases is None else leases
        self._tiers = Tiers(node_id, arena, store, policy, self._leases, self._counters)
        self._index = self._tiers.index
        self._lock = self._tiers.lock
        self._pending: set[PendingPut] = set()
        self._draining = False
        self._unforgotten: deque[tuple[RecordMeta, int]] = deque()
        # Whose text was cut before it, by tenant and chunk.
        self._cut: TTLCache[tuple[str, ChunkId], None] = TTLCache(_MOST_CUT, _CUT_S)
        if store is not None:
            self._recover(store)

    def lookup(
        self,
        chunks: Sequence[ChunkName],
        encodings: Sequence[str],
        *,
        lease_s: float = 0.0,
        max_header_bytes: int | None = None,
        with_headers: bool = True,
        peek: bool = False,
        all_encodings: bool = False,
        any_context: bool = False,
        use_follows: bool = False,
        proceed: Callable[[], None] = lambda: None,
    ) -> LookupResult:
        """Says for each chunk in which of `encodings` (best first) it is here, and how many other contexts
        hold the same content; with `all_encodings` also in which others of them, or of any when there are none.
        With `any_context` a chunk that is not here in its own context is answered with another one of its content: one
        that does not begin its text if there is any, of those one in memory, of those the one used last.

        Leases what was found for `lease_s` when positive. Counts as one use of it, unless it is a `peek`, or
        `use_follows`: then `use` says what of it is used.

        Holds the lock for SLICE_CHUNKS chunks at a time and calls `proceed` without it in between. What that raises
        ends the lookup; then nothing is leased.

        Further encodings of later chunks are left out where their headers would not fit into `max_header_bytes`.
        Raises StorageError when those of one encoding of each chunk have more together; then nothing is leased.
        """
        search = ChunkSearch(
            self._tiers,
            chunks,
            encodings,
            now_s=self._clock(),
            max_header_bytes=max_header_bytes,
            with_headers=with_headers,
            all_encodings=all_encodings,
            any_context=any_context,
        )
        lease_id: LeaseId | None = None
        try:
            for begin in range(0, len(chunks), SLICE_CHUNKS):
                if begin:
                    proceed()
                with self._slice(begin):
                    found = search.find(begin)
                    self._leases.expire()
                    if found and lease_s > 0:
                        lease_id = self._leases.cover(lease_id, found, lease_s)
            if use_follows:
                if lease_id is not None:
                    with self._lock:
                        self._leases.expect_use(lease_id, search.findings())
            elif not peek:
                self._touch(search.hits)
            if not peek:
                self._count(search, used=not use_follows)
            search.read_headers(proceed)
        except BaseException:
            with self._lock:
                search.release()
                if lease_id is not None:
                    self._leases.release(lease_id)
            raise
        return LookupResult(search.answers, lease_id)

    def use(self, lease_id: LeaseId, used: bytes, tokens: int) -> bool:
        """What of a lookup that said `use_follows` its caller can use: bit i % 8 of byte i / 8 of `used` says it of
        answer i; they have so many tokens. Those chunks are used now, once; the lease on the others ends. False when
        the lease has ended or this was said before."""
        with self._lock:
            found = self._leases.expected_use(lease_id)
        if found is None:
            return False
        kept = found.used(used)
        with self._lock:
            self._leases.narrow(lease_id, kept.keys)
        answers = len(set(kept.answers))
        self._touch(kept.keys)
        with self._lock:
            self._counters.hits += answers
            self._counters.approximate_hits += len(kept.approximate)
            self._counters.hit_tokens += min(tokens, answers * _MOST_TOKENS)
            self._counters.unusable += len(set(found.answers)) - answers
        return True

    def begin_put(
        self,
        chunk_id: ChunkId,
        encoding: str,
        size_bytes: int,
        calibration: bytes | None = None,
        options: PutOptions = PutOptions(),  # noqa: B008 (frozen)
    ) -> PendingPut | None:
        """Reserves memory for a chunk, evicting what nobody uses; None when the chunk is here already, as durable as
        was asked for and for about as long. One that was coded with another `calibration` (a digest) is replaced: who
        puts this could not read that.

        The caller must end the put with `commit` or `revoke`. Raises UnknownEncodingError, PutStateError for
        an empty chunk, ChunkTooLargeError, ArenaFullError, TextTooLongError, OverQuotaError, NotDurableError,
        NodeDrainingError; then nothing was reserved and nothing evicted.
        """
        durable = self._asked(options) is Durability.DURABLE
        try:
            Encoding.parse(encoding)
            self._require_possible(chunk_id, size_bytes, options.tenant, durable=durable)
            with self._lock:
                slot = self._alive(self._index.find(chunk_id, encoding), self._clock())
                if (
                    slot is None
                    or self._index.calibration(slot) != calibration
                    or self._ends_much_sooner(slot, options.ttl_s)
                ):
                    return self._reserve(chunk_id, encoding, size_bytes, options)
                before = self._before(encoding, options)
                self._tiers.put_again(slot, before)
                self._tiers.hold(slot)
            try:
                if durable:
                    self._make_durable(slot)
            finally:
                with self._lock:
                    self._tiers.release(slot)
        except Exception:
            with self._lock:
                self._counters.put_rejected += 1
            raise
        return None

    @contextmanager
    def open(self, chunk_id: ChunkId, encoding: str, *, peek: bool = False) -> Iterator[ChunkReader]:
        """A reader of the chunk's frames. Views of what is in memory stay valid until the block is left, even when the
        chunk is deleted meanwhile. Counts as use, unless it is a `peek`, or the chunk is leased: then its lookup has
        counted. Raises ChunkNotFoundError."""
        with self._lock:
            slot = self._alive(self._index.find(chunk_id, encoding), self._clock())
            if slot is None:
                raise ChunkNotFoundError(
                    f"chunk {chunk_id.short} is not stored as {encoding} on {self.node_id}"
                )
            if not (peek or self._leases.holds(slot)):
                self._tiers.touch([slot])
            self._tiers.hold(slot)
        reader = ChunkReader(self._tiers, slot, self._index.size_bytes[slot])
        try:
            yield reader
        finally:
            with self._lock:
                self._counters.reads += reader.ranges_read
                self._counters.bytes_out += reader.bytes_read
                self._tiers.release(slot)

    def renew_lease(self, lease_id: LeaseId, lease_s: float) -> bool:
        """Lets the lease run `lease_s` from now; False when it has ended."""
        with self._lock:
            return self._leases.renew(lease_id, lease_s)

    def release_lease(self, lease_id: LeaseId) -> bool:
        """Ends the lease; False when it has ended already."""
        with self._lock:
            return self._leases.release(lease_id)

    def delete(self, chunks: Sequence[ChunkId]) -> int:
        """Removes every encoding of these chunks, leased or pinned or not, also from a later start, and returns how
        many variants that were. Memory that is being read is given back when the last reader has gone."""
        deleted = 0
        for begin in range(0, len(chunks), SLICE_CHUNKS):
            with self._slice(begin):
                sequence = self._store.newest_sequence if self._store is not None else 0
                for chunk_id in chunks[begin : begin + SLICE_CHUNKS]:
                    for slot in list(self._index.variants(chunk_id)):
                        if self._store is not None:
                            self._unforgotten.append((self._index.meta(slot), sequence))
                        self._tiers.remove(slot)
                        self._counters.deletes += 1
                        deleted += 1
        self._forget_again()
        return deleted

    def report(self, chunks: Sequence[ChunkId], scores: Sequence[float]) -> None:
        """Attention, 0 to 1, that a model paid to these chunks; unknown ones are ignored."""
        for begin in range(0, len(chunks), SLICE_CHUNKS):
            end = begin + SLICE_CHUNKS
            with self._slice(begin):
                for chunk_id, score in zip(chunks[begin:end], scores[begin:end], strict=True):
                    for slot in self._index.variants(chunk_id):
                        self._tiers.report(slot, score)

    def set_pins(self, pins: Set[ChunkId]) -> None:
        """These chunks, and no others, are not evicted from now on; they need not be here yet."""
        with self._lock:
            self._tiers.set_pins(pins)

    def set_quotas(self, limits: Mapping[str, int]) -> None:
        """Bytes that each of these tenants may have on this node; others have no limit."""
        with self._lock:
            self._tiers.quotas.set_limits(limits)

    def set_draining(self, draining: bool) -> None:
        """While it is set, nothing new is stored: who counts what there is to give away has all of it."""
        with self._lock:
            self._draining = draining

    def limit_disk(self, read_bytes_per_s: float | None) -> None:
        """Makes reads from the disk as slow as on another one, for experiments; None: as fast as they are. Under a
        limit what is on disk is only there: memory that also has it is given back, at once or within a second of a put,
        and nothing is promoted. Raises ConfigurationError."""
        if self._store is not None:
            self._store.read_speed.set(read_bytes_per_s)
            self._tiers.demote()
        elif read_bytes_per_s is not None:
            raise ConfigurationError(f"{self.node_id} has no disk that could be slow; start it with --disk")

    def list(
        self,
        cursor: int = 0,
        limit: int = MAX_LISTED,
        *,
        content_prefix: bytes = b"",
        tenant: str | None = None,
    ) -> tuple[list[StoredVariant], int]:
        """Up to `limit` stored variants from `cursor` (0 at first) on, and the cursor of the next page, 0 at the end.
        What comes or goes meanwhile may be missing or appear."""
        listed: list[StoredVariant] = []
        while len(listed) < limit:
            with self._slice(cursor):
                slots = self._index.slots
                for slot in range(cursor, min(cursor + MAX_LISTED, slots)):
                    cursor = slot + 1
                    if (
                        self._index.listed(slot)
                        and self._index.content_id(slot).startswith(content_prefix)
                        and tenant in (None, self._index.tenant(slot))
                    ):
                        listed.append(self._variant(slot))
                        if len(listed) == limit:
                            break
            if cursor >= slots:
                return listed, 0
        return listed, cursor

    def verify(self, chunk_id: ChunkId, encoding: str) -> str | None:
        """Reads a variant back, in each tier that it is in, and says why it is damaged, if it is. A damaged copy is
        dropped, and the chunk with the last one. One that is not here is not damaged."""
        with self._lock:
            slot = self._index.find(chunk_id, encoding)
            if slot is None:
                return None
            self._tiers.hold(slot)
        try:
            return self._tiers.verify(slot)
        finally:
            with self._lock:
                self._tiers.release(slot)

    def stats(self) -> NodeStats:
        with self._lock:
            self._leases.expire()
            tiers, store = self._tiers, self._store
            disk_limit = store.read_speed.limit_bytes_per_s if store else None
            return NodeStats(
                self.node_id,
                chunks=len(self._index),
                bytes_used=self._arena.used_bytes,
                bytes_limit=self._arena.capacity_bytes,
                leases=len(self._leases),
                counters=self._counters.as_dict(),
                gauges={
                    "memory_chunks": len(tiers.in_memory),
                    "disk_chunks": len(tiers.on_disk),
                    "disk_bytes_used": store.live_bytes if store else 0,
                    "disk_bytes_limit": store.capacity_bytes if store else 0,
                    "pinned": len(tiers.pinned),
                    "dirty": len(tiers.dirty),
                }
                | ({} if disk_limit is None else {"disk_throttle_Bps": int(disk_limit)}),
                disk_error=store.error if store else "",
            )

    def maintain(self) -> bool:
        """One round of what happens behind the clients' backs: chunks are written back, demoted, expired, and segments
        compacted. True when there is more to do at once."""
        more = True
        while more:
            with self._slice(SLICE_CHUNKS):
                more = self._tiers.settle(SLICE_CHUNKS)
        self._tiers.expire(self._clock())
        busy = self._tiers.flush()
        self._tiers.demote()
        self._forget_again()
        if self._store is not None:
            try:
                busy |= self._tiers.compact()
            except DiskError:
                if not busy:  # what is to be written back does not wait for it
                    raise
        return busy

    def wait_for_work(self, timeout_s: float) -> None:
        """Returns when something is to be written back, or after the time."""
        with self._lock:
            self._lock.wait_for(lambda: self._tiers.dirty, timeout_s)

    def close(self) -> None:
        """Writes back what is only in memory and closes the disk. No put or read may be under way."""
        if self._store is not None:
            while self._tiers.flush():
                pass
            self._store.close()

    def check_integrity(self) -> None:
        """Raises StorageError unless every block is owned exactly once and the books agree."""
        with self._lock:
            index, tiers = self._index, self._tiers
            extents = [extent for extent in index.extent if extent is not None] + tiers.dropped_extents()
            self._arena.check_integrity([*extents, *(put.extent for put in self._pending)])
            in_memory = {slot for slot in index if index.extent[slot] is not None}
            on_disk = {slot for slot in index if index.location[slot] != NOWHERE}
            if (set(tiers.in_memory), set(tiers.on_disk)) != (in_memory, on_disk):
                raise StorageError(f"{self.node_id}: index and eviction order name different chunks")
            tiers.in_memory.check_integrity()
            tiers.on_disk.check_integrity()
            if in_memory | on_disk != set(index) or len(set(index)) != len(index):
                raise StorageError(f"{self.node_id}: the index names a chunk that lies nowhere")
            if not tiers.dirty.keys() <= in_memory - on_disk:
                raise StorageError(
                    f"{self.node_id}: a chunk waits for a disk that it is on, or is not in memory"
                )

    @contextmanager
    def _slice(self, begin: int) -> Iterator[None]:
        """The lock, for a part of a long call. Lets whoever waits for it have it first, unless this is the first part:
        a thread that only releases the lock takes it again before the other one has woken."""
        if begin:
            time.sleep(PAUSE_S)
        with self._lock:
            yield

    def _forget_again(self) -> None:
        """Tells the disk what was deleted. Raises DiskError; what it was not told is kept for the next time."""
        while self._store is not None:
            with self._lock:
                if not self._unforgotten:
                    return
                meta, sequence = self._unforgotten.popleft()
            try:
                self._store.forget(meta, sequence)
            except DiskError:
                with self._lock:
                    self._unforgotten.appendleft((meta, sequence))
                raise

    def _recover(self, store: SegmentStore) -> None:
        recovery = store.recover()
        for line in recovery.dropped:
            log.warning("%s: %s", self.node_id, line)
        with self._lock:
            self._tiers.adopt(recovery.records)

    def _asked(self, options: PutOptions) -> Durability:
        return self._durability if options.durability is Durability.DEFAULT else options.durability

    def _reserve(self, chunk_id: ChunkId, encoding: str, size_bytes: int, options: PutOptions) -> PendingPut:
        """The caller has the lock."""
        self._require_open(chunk_id)
        tiers, tenant = self._tiers, options.tenant
        before = self._before(encoding, options)
        try:
            self._require_beginning(chunk_id, before, options)
            tiers.over_quota(tenant, size_bytes, before)  # before anything is evicted
            extent = tiers.reserve(size_bytes, before=before, patience_s=FLUSH_PATIENCE_S)
            before = self._before(encoding, options)  # others may have put and deleted while it waited
            try:
                victims = tiers.over_quota(tenant, size_bytes, before)
            except StorageError:
                self._arena.free(extent)
                raise
        except TextTooLongError:
            self._counters.texts_cut += 1
            self._cut[tenant, chunk_id] = None
            raise
        self._cut.pop((tenant, chunk_id), None)
        for slot in victims:
            tiers.remove(slot)
        self._counters.evictions += len(victims)
        if before != NO_SLOT:
            tiers.hold(before)  # nothing that comes meanwhile may cut the text here
        put = PendingPut(
            self._arena,
            extent,
            chunk_id,
            encoding,
            options,
            before=before,
            accept=self._accept,
            drop=self._drop,
        )
        self._pending.add(put)
        tiers.quotas.reserve(tenant, size_bytes)
        return put

    def _before(self, encoding: str, options: PutOptions) -> int:
        """The slot of what is here of the text before a chunk that is put; NO_SLOT: nothing, as far as is known."""
        return self._index.stands_behind(options.tenant, options.number, options.behind, encoding)

    def _require_beginning(self, chunk_id: ChunkId, before: int, options: PutOptions) -> None:
        """What stands behind a chunk that was refused for being too far from its text's beginning is, too."""
        if before == NO_SLOT and any((options.tenant, behind) in self._cut for behind in options.behind):
            raise TextTooLongError(
                f"chunk {chunk_id.short} is not stored: {self.node_id} has just refused the one before it in its text, "
                "of which it keeps the beginning; give the node more memory"
            )

    def _require_open(self, chunk_id: ChunkId) -> None:
        if self._draining:
            raise NodeDrainingError(
                f"chunk {chunk_id.short} is not stored: {self.node_id} is draining; its owners are other nodes now"
            )

    def _end(self, put: PendingPut) -> None:
        """The put is no longer under way; the caller has the lock."""
        self._pending.remove(put)
        self._tiers.quotas.reserve(put.options.tenant, -put.extent.size_bytes)
        self._counters.bytes_in += put.written_bytes

    def _release_before(self, put: PendingPut) -> None:
        """The last that is done with a put; the caller has the lock."""
        if put.before != NO_SLOT:
            self._tiers.release(put.before)

    def _ends_much_sooner(self, slot: int, ttl_s: float) -> bool:
        """Whether a stored chunk would be forgotten long before one that is put now."""
        expires_at_s = self._index.expires_at_s(slot)
        return expires_at_s > 0 and (ttl_s == 0 or expires_at_s - self._clock() < ttl_s / 2)

    def _require_possible(self, chunk_id: ChunkId, size_bytes: int, tenant: str, *, durable: bool) -> None:
        if size_bytes < 1:
            raise PutStateError(f"chunk {chunk_id.short} was announced with {size_bytes} bytes")
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
                f"chunk {chunk_id.short} has {size_bytes} bytes, but {self.node_id} holds only "
                f"{self._arena.capacity_bytes} bytes in all; give the node more memory"
            )
        if durable and self._store is None:
            raise NotDurableError(
                f"chunk {chunk_id.short} cannot be kept durably: {self.node_id} has no disk; start it with --disk"
            )

    def _alive(self, slot: int | None, now_s: float) -> int | None:
        """None for a chunk whose time is over, too."""
        if slot is not None and 0 < self._index.expires_at_s(slot) <= now_s:
            return None
        return slot

    def _count(self, search: ChunkSearch, *, used: bool) -> None:
        with self._lock:
            self._counters.lookups += 1
            self._counters.misses += search.missed
            if used:
                self._counters.hits += len(search.answers) - search.missed
                self._counters.approximate_hits += len(search.approximate)

    def _touch(self, slots: Sequence[int]) -> None:
        """Last chunk first: a later chunk is worth nothing without those before it, so it is older. All that a chunk is
        stored as is used alike: what of it will be read is not known yet."""
        used = slots[::-1]
        for begin in range(0, len(used), SLICE_CHUNKS):
            with self._slice(begin):
                # A slot without a lease may be free again by now.
                self._tiers.touch(filter(self._index.listed, used[begin : begin + SLICE_CHUNKS]))
                if len(used) > SLICE_CHUNKS:
                    self._tiers.settle()  # or the next one who has to would do all of it at once

    def _variant(self, slot: int) -> StoredVariant:
        index = self._index
        expires_at_s = index.expires_at_s(slot)
        return StoredVariant(
            index.chunk_id(slot),
            index.encoding(slot),
            index.size_bytes[slot],
            index.calibration(slot),
            in_memory=index.extent[slot] is not None,
            on_disk=index.location[slot] != NOWHERE,
            pinned=slot in self._tiers.pinned,
            ttl_left_s=max(1, round(expires_at_s - self._clock())) if expires_at_s else 0,
            tenant=index.tenant(slot),
            cost=index.cost(slot),
            number=index.texts.number[slot],
            behind=tuple(map(index.chunk_id, islice(index.texts.all_before(slot), MOST_BEHIND))),
        )

    def _make_durable(self, slot: int) -> None:
        """A stored, held chunk shall survive a power loss. Raises NotDurableError."""
        try:
            self._tiers.make_durable(slot)
        except DiskError as error:
            raise NotDurableError(str(error)) from error

    def _accept(self, put: PendingPut, meta: RecordMeta) -> bool:
        """Makes a verified chunk visible, on disk first if it shall survive; False when another put of the same chunk
        was first. When that raises, the put is taken back."""
        if put.options.ttl_s > 0:
            meta = replace(meta, expires_at_s=self._clock() + put.options.ttl_s)
        try:
            with self._lock:
                self._require_open(meta.chunk_id)
                self._index.admit(meta)
                if put.before != NO_SLOT:
                    meta = replace(meta, behind=self._index.chunk_id(put.before))
            location = self._write_through(put, meta)
        except BaseException:
            self._drop(put, rejected=True)
            raise
        with self._lock:
            self._end(put)
            stored = self._index.find(meta.chunk_id, meta.encoding)
            if stored is not None and not self._replaces(meta, location, stored, put.options.ttl_s):
                self._arena.free(put.extent)
                if self._store is not None and location != NOWHERE:
                    self._store.delete(location)
                self._release_before(put)
                return False
            if stored is not None:
                self._tiers.remove(stored)
            refused = location == NOWHERE and self._asked(put.options) is not Durability.MEMORY
            self._tiers.insert(
                meta,
                extent=put.extent,
                location=location,
                write_back=self._store
                is not None,  # also what the disk has refused: once more, by the keeper
                before=put.before if put.before != NO_SLOT and self._index.listed(put.before) else NO_SLOT,
            )
            self._release_before(put)
            self._counters.disk_refused += refused and self._store is not None
            self._counters.puts += 1
            return True

    def _write_through(self, put: PendingPut, meta: RecordMeta) -> Location:
        """Where the chunk is on disk now; NOWHERE when it is to be there later, or the disk refused it and it need not
        survive. Raises NotDurableError."""
        asked = self._asked(put.options)
        if self._store is None or asked is Durability.MEMORY:
            return NOWHERE
        try:
            sync = asked is Durability.DURABLE
            return self._tiers.write(meta, put.extent, sync=sync, before=put.before)
        except DiskError as error:
            if asked is Durability.DURABLE:
                raise NotDurableError(str(error)) from error
            return NOWHERE

    def _replaces(self, meta: RecordMeta, location: Location, stored: int, ttl_s: float) -> bool:
        """Whether a chunk that was put takes the place of the stored one: nobody could read that, it ends sooner, or it
        would not survive and this one does. The bytes of two workers may differ, so it is one or the other."""
        return (
            self._index.calibration(stored) != meta.calibration
            or self._alive(stored, self._clock()) is None
            or self._ends_much_sooner(stored, ttl_s)
            or (location != NOWHERE and self._index.location[stored] == NOWHERE)
        )

    def _drop(self, put: PendingPut, *, rejected: bool) -> None:
        """Takes back what a put had reserved."""
        with self._lock:
            self._end(put)
            self._arena.free(put.extent)
            self._counters.put_rejected += rejected
            self._release_before(put)
