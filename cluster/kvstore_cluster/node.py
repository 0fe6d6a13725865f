"""A storage node: chunks in DRAM, found by content, kept by use, protected by leases. No network, no Ray."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from kvstore_cluster.arena import Arena, Extent
from kvstore_cluster.eviction.keyed import EvictionPolicy, LeastRecentlyUsed
from kvstore_cluster.index import ChunkIndex, Entry, VariantKey
from kvstore_cluster.leases import LeaseId, LeaseTable
from kvstore_cluster.put import PendingPut
from kvstore_cluster.reader import ChunkReader
from kvstore_cluster.stats import NodeCounters, NodeStats
from kvstore_codec.encoding import Encoding
from kvstore_codec.errors import (
    ArenaFullError,
    ChunkNotFoundError,
    ChunkTooLargeError,
    PutStateError,
    StorageError,
)
from kvstore_codec.identity import ChunkId


@dataclass(frozen=True, slots=True)
class LookupAnswer:
    """`encoding` is None when the exact chunk is not here in an acceptable encoding."""

    encoding: str | None
    size_bytes: int
    header: bytes
    other_contexts: int


@dataclass(frozen=True, slots=True)
class LookupResult:
    """One answer per asked chunk, in order; `lease_id` is None when nothing was leased."""

    answers: list[LookupAnswer]
    lease_id: LeaseId | None


class StorageNode:
    """Thread-safe. One lock guards the books; bytes are written, verified and read outside it.

    Raises ConfigurationError when the memory cannot be had.
    """

    def __init__(
        self,
        node_id: str,
        arena: Arena,
        *,
        eviction: EvictionPolicy[VariantKey] | None = None,
        leases: LeaseTable[VariantKey] | None = None,
    ) -> None:
        self.node_id = node_id
        self._arena = arena
        self._eviction = LeastRecentlyUsed() if eviction is None else eviction
        self._leases = LeaseTable() if leases is None else leases
        self._index = ChunkIndex()
        self._pending: set[PendingPut] = set()
        self._leaving: set[Entry] = set()  # no longer visible, but somebody still reads them
        self._counters = NodeCounters()
        self._lock = threading.Lock()

    def lookup(
        self,
        chunks: Sequence[ChunkId],
        encodings: Sequence[str],
        *,
        lease_s: float = 0.0,
        max_header_bytes: int | None = None,
    ) -> LookupResult:
        """Says for each chunk in which of `encodings` (best first) it is here, and how many other contexts
        hold the same content. Counts as use of what was found, and leases it for `lease_s` when positive.

        Raises StorageError when the headers of what was found have more than `max_header_bytes` together; then
        nothing is leased.
        """
        answers = []
        found = []
        header_bytes = 0
        with self._lock:
            for chunk_id in chunks:
                entry = self._best(chunk_id, encodings)
                others = self._index.other_contexts(chunk_id.content_id, chunk_id.prefix_id)
                if entry is None:
                    answers.append(LookupAnswer(None, 0, b"", others))
                else:
                    header_bytes += len(entry.header_bytes)
                    if max_header_bytes is not None and header_bytes > max_header_bytes:
                        raise StorageError(
                            f"the headers of the first {len(answers) + 1} of {len(chunks)} chunks have more "
                            f"than {max_header_bytes} bytes; look fewer chunks up at a time"
                        )
                    found.append(entry.key)
                    answers.append(
                        LookupAnswer(entry.key.encoding, entry.extent.size_bytes, entry.header_bytes, others)
                    )
            # Last chunk first: a later chunk is worth nothing without those before it, so it is older.
            for key in reversed(found):
                self._eviction.touch(key)
            self._leases.expire()
            lease_id = self._leases.grant(found, lease_s) if found and lease_s > 0 else None
            self._counters.lookups += 1
            self._counters.hits += len(found)
            self._counters.misses += len(answers) - len(found)
        return LookupResult(answers, lease_id)

    def begin_put(
        self, chunk_id: ChunkId, encoding: str, size_bytes: int, calibration: bytes | None = None
    ) -> PendingPut | None:
        """Reserves memory for a chunk, evicting what nobody uses; None when the chunk is here already. One that was
        coded with another `calibration` (a digest) is replaced: who puts this could not read that.

        The caller must end the put with `commit` or `revoke`. Raises UnknownEncodingError, PutStateError for
        an empty chunk, ChunkTooLargeError, ArenaFullError; then nothing was reserved and nothing evicted.
        """
        key = VariantKey.of(chunk_id, encoding)
        with self._lock:
            try:
                Encoding.parse(encoding)
                stored = self._index.get(key)
                if stored is not None and stored.header.calibration == calibration:
                    self._eviction.touch(key)
                    return None
                extent = self._reserve(chunk_id, size_bytes)
            except Exception:
                self._counters.put_rejected += 1
                raise
            put = PendingPut(self._arena, extent, chunk_id, encoding, accept=self._accept, drop=self._drop)
            self._pending.add(put)
            return put

    @contextmanager
    def open(self, chunk_id: ChunkId, encoding: str) -> Iterator[ChunkReader]:
        """A reader of the chunk's frames. Its views stay valid until the block is left, even when the chunk
        is deleted meanwhile. Counts as use. Raises ChunkNotFoundError."""
        key = VariantKey.of(chunk_id, encoding)
        with self._lock:
            entry = self._index.get(key)
            if entry is None:
                raise ChunkNotFoundError(
                    f"chunk {chunk_id.short} is not stored as {encoding} on {self.node_id}"
                )
            self._eviction.touch(key)
            entry.readers += 1
        reader = ChunkReader(self._arena, entry)
        try:
            yield reader
        finally:
            with self._lock:
                entry.readers -= 1
                self._counters.reads += reader.ranges_read
                self._counters.bytes_out += reader.bytes_read
                self._release(entry)

    def renew_lease(self, lease_id: LeaseId, lease_s: float) -> bool:
        """Lets the lease run `lease_s` from now; False when it has ended."""
        with self._lock:
            return self._leases.renew(lease_id, lease_s)

    def release_lease(self, lease_id: LeaseId) -> bool:
        """Ends the lease; False when it has ended already."""
        with self._lock:
            return self._leases.release(lease_id)

    def delete(self, chunks: Sequence[ChunkId]) -> int:
        """Removes every encoding of these chunks, leased or not, and returns how many variants that were.
        Memory that is being read is given back when the last reader has gone."""
        deleted = 0
        with self._lock:
            for chunk_id in chunks:
                for entry in list(self._index.encodings(chunk_id.content_id, chunk_id.prefix_id).values()):
                    self._remove(entry)
                    deleted += 1
            self._counters.deletes += deleted
        return deleted

    def stats(self) -> NodeStats:
        with self._lock:
            self._leases.expire()
            return NodeStats(
                self.node_id,
                chunks=len(self._index),
                bytes_used=self._arena.used_bytes,
                bytes_limit=self._arena.capacity_bytes,
                leases=len(self._leases),
                counters=self._counters.as_dict(),
            )

    def check_integrity(self) -> None:
        """Raises StorageError unless every block is owned exactly once and the books agree."""
        with self._lock:
            entries = list(self._index)
            extents = [entry.extent for entry in (*entries, *self._leaving)]
            self._arena.check_integrity([*extents, *(put.extent for put in self._pending)])
            if set(self._eviction.victims()) != {entry.key for entry in entries} or len(entries) != len(
                self._index
            ):
                raise StorageError(f"{self.node_id}: index and eviction order name different chunks")
            if not all(entry.visible and entry.readers >= 0 for entry in entries):
                raise StorageError(f"{self.node_id}: the index holds an entry that was removed")
            if not all(entry.readers > 0 and not entry.visible for entry in self._leaving):
                raise StorageError(f"{self.node_id}: a removed chunk is kept without a reader")

    def _best(self, chunk_id: ChunkId, encodings: Sequence[str]) -> Entry | None:
        stored = self._index.encodings(chunk_id.content_id, chunk_id.prefix_id)
        if not stored:
            return None
        return next((stored[encoding] for encoding in encodings if encoding in stored), None)

    def _reserve(self, chunk_id: ChunkId, size_bytes: int) -> Extent:
        if size_bytes < 1:
            raise PutStateError(f"chunk {chunk_id.short} was announced with {size_bytes} bytes")
        if size_bytes > self._arena.capacity_bytes:
            raise ChunkTooLargeError(
                f"chunk {chunk_id.short} has {size_bytes} bytes, but {self.node_id} holds only "
                f"{self._arena.capacity_bytes} bytes in all; give the node more memory"
            )
        self._make_room(self._arena.footprint_bytes(size_bytes))
        return self._arena.allocate(size_bytes)

    def _make_room(self, needed_bytes: int) -> None:
        """Evicts until `needed_bytes` are free, or raises ArenaFullError and evicts nothing."""
        missing_bytes = needed_bytes - (self._arena.capacity_bytes - self._arena.used_bytes)
        if missing_bytes <= 0:
            return
        self._leases.expire()
        victims: list[Entry] = []
        for key in self._eviction.victims():
            entry = self._index.get(key)
            if entry is None or entry.readers or self._leases.holds(key):
                continue
            victims.append(entry)
            missing_bytes -= self._arena.footprint_bytes(entry.extent.size_bytes)
            if missing_bytes <= 0:
                break
        else:
            raise ArenaFullError(
                f"{self.node_id} has no room for {needed_bytes} bytes: all that is stored in its "
                f"{self._arena.capacity_bytes} bytes is leased, being read or being written; retry later or "
                "give the node more memory"
            )
        for entry in victims:
            self._remove(entry)
        self._counters.evictions += len(victims)

    def _remove(self, entry: Entry) -> None:
        self._index.remove(entry.key)
        self._eviction.remove(entry.key)
        entry.visible = False
        self._leaving.add(entry)
        self._release(entry)

    def _release(self, entry: Entry) -> None:
        """Gives the memory back once the entry is neither visible nor read."""
        if not entry.visible and not entry.readers:
            self._leaving.remove(entry)
            self._arena.free(entry.extent)

    def _accept(self, put: PendingPut, entry: Entry) -> bool:
        """Makes a verified chunk visible; False when another put of the same chunk was first."""
        with self._lock:
            self._pending.remove(put)
            self._counters.bytes_in += put.written_bytes
            stored = self._index.get(entry.key)
            if stored is not None:
                if stored.header.calibration == entry.header.calibration:
                    self._arena.free(entry.extent)
                    return False
                self._remove(stored)
            self._index.add(entry)
            self._eviction.add(entry.key)
            self._counters.puts += 1
            return True

    def _drop(self, put: PendingPut, *, rejected: bool) -> None:
        """Takes back what a put had reserved."""
        with self._lock:
            self._pending.remove(put)
            self._arena.free(put.extent)
            self._counters.bytes_in += put.written_bytes
            self._counters.put_rejected += rejected
