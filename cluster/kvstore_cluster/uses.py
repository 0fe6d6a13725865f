"""Uses of stored chunks: which chunks a lookup used, and what is counted of that."""

from collections.abc import Sequence

from kvstore_cluster.catalog import ChunkCatalog
from kvstore_cluster.leases import LeaseId
from kvstore_cluster.lookup import ChunkSearch
from kvstore_cluster.slices import SLICE_CHUNKS, locked_slice

_MOST_TOKENS = 1 << 16  # of a chunk, whatever a client says


class Uses:
    """Touches and counts what lookups found. Lock not held, by any method."""

    def __init__(self, catalog: ChunkCatalog) -> None:
        self._catalog = catalog

    def report(self, lease_id: LeaseId, used: bytes, tokens: int) -> bool:
        """As `StorageNode.use`."""
        leases, counters = self._catalog.leases, self._catalog.counters
        with self._catalog.lock:
            found = leases.expected_use(lease_id)
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
            counters.hit_tokens += min(tokens, answers * _MOST_TOKENS)
            counters.unusable += len(set(found.answers)) - answers
        return True

    def count(self, search: ChunkSearch, *, used: bool) -> None:
        """Counts one lookup, and as hits what it found when that is `used`."""
        counters = self._catalog.counters
        with self._catalog.lock:
            counters.lookups += 1
            counters.misses += search.missed
            if used:
                counters.hits += len(search.answers) - search.missed
                counters.approximate_hits += len(search.approximate)

    def touch(self, slots: Sequence[int]) -> None:
        """The chunks in these slots were used. Last chunk first: a later chunk is worth nothing without those before
        it, so it is older. All that a chunk is stored as is used alike: what of it will be read is not known yet."""
        catalog = self._catalog
        used = slots[::-1]
        for begin in range(0, len(used), SLICE_CHUNKS):
            with locked_slice(catalog.lock, first=not begin):
                # A slot without a lease may be free again by now.
                catalog.touch(catalog.index.linked(used[begin : begin + SLICE_CHUNKS]))
                if len(used) > SLICE_CHUNKS:
                    catalog.flush_touches()  # or the next one who has to would do all of it at once
