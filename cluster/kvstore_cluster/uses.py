"""Uses of stored chunks: reports them to the eviction policies and counts hits."""

from collections.abc import Sequence

from kvstore_cluster.catalog import ChunkCatalog
from kvstore_cluster.leases import LeaseId
from kvstore_cluster.lookup import ChunkSearch
from kvstore_cluster.slices import SLICE_CHUNKS, locked_slice

_MOST_TOKENS = 1 << 16  # limit of the tokens per chunk that a client may report


class Uses:
    """Records and counts the chunks that lookups found. Every method: lock not held."""

    def __init__(self, catalog: ChunkCatalog) -> None:
        self._catalog = catalog

    def report(self, lease_id: LeaseId, used: bytes, tokens: int, tenant: str | None) -> bool:
        """Implements `StorageNode.use`."""
        leases, counters = self._catalog.leases, self._catalog.counters
        with self._catalog.lock:
            found = leases.expected_use(lease_id) if leases.belongs_to(lease_id, tenant) else None
            owner = leases.owner(lease_id)
        if found is None:
            return False
        kept = found.used(used)
        with self._catalog.lock:
            if not leases.narrow(lease_id, kept.keys):
                return False
        answers = len(set(kept.answers))
        self.touch(kept.keys)
        with self._catalog.lock:
            counters.hits += answers
            counters.approximate_hits += len(kept.approximate)
            tokens = min(tokens, answers * _MOST_TOKENS)
            counters.hit_tokens += tokens
            self._catalog.tallies.asked(owner, hits=answers, hit_tokens=tokens)
            counters.unusable += len(set(found.answers)) - answers
        return True

    def count(self, search: ChunkSearch, *, used: bool) -> None:
        """Counts one lookup and its misses. Counts its hits only when `used`."""
        counters = self._catalog.counters
        with self._catalog.lock:
            counters.lookups += 1
            counters.misses += search.missed
            found = len(search.answers) - search.missed
            self._catalog.tallies.asked(search.tenant, chunks=len(search.answers), hits=found if used else 0)
            if used:
                counters.hits += found
                counters.approximate_hits += len(search.approximate)

    def touch(self, slots: Sequence[int]) -> None:
        """Records uses of the chunks in these slots. Touches the last chunk first, because a later chunk is worth
        nothing without the chunks before it and must be evicted earlier. Touches all found encodings of a chunk,
        because the node does not know yet which one the client will read."""
        catalog = self._catalog
        used = slots[::-1]
        for begin in range(0, len(used), SLICE_CHUNKS):
            with locked_slice(catalog.lock, first=not begin):
                # A slot without a lease may have been freed in the meantime.
                catalog.touch(catalog.index.linked(used[begin : begin + SLICE_CHUNKS]))
                if len(used) > SLICE_CHUNKS:
                    catalog.flush_touches()  # otherwise a later call would have to flush all of them at once
