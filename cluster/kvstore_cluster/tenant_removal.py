"""Removes the chunks of forgotten tenants from a storage node."""

import logging
import threading

from kvstore_cluster.catalog import ChunkCatalog
from kvstore_cluster.disk.forgotten import ForgottenRecords
from kvstore_cluster.disk_tier import DiskTier
from kvstore_cluster.forgotten import Forgotten
from kvstore_cluster.intake import Intake
from kvstore_cluster.leaving import Leaving
from kvstore_cluster.slices import REMOVED_CHUNKS, SLICE_CHUNKS, locked_slice
from kvstore_codec.errors import DiskError

log = logging.getLogger(__name__)


class TenantRemoval:
    """Applies the coordinator's list of forgotten tenants. Thread-safe; methods may block on the disk. Construct it
    after the disk was recovered.

    What is applied is noted in the folder of the disk, so that a restart neither recovers these chunks nor removes
    those that the tenant has stored since. Until the note is written, a restart removes both.
    """

    def __init__(self, catalog: ChunkCatalog, disk: DiskTier, intake: Intake) -> None:
        self._catalog, self._disk, self._intake = catalog, disk, intake
        self._turn = threading.Lock()
        store = catalog.store
        self._records = store.forgotten if store is not None else ForgottenRecords()
        self._noted = self._records
        self._failure = ""
        # Removed slots whose bytes are still written to disk. Their records follow the noted numbers.
        self._busy: set[int] = set()
        intake.forgotten = self._records.applied

    @property
    def generation(self) -> int:
        """The newest forgetting whose chunks are removed."""
        return self._records.applied.newest

    def apply(self, order: Forgotten | None) -> None:
        """Removes the chunks of tenants in `order`, even if leased or pinned, that were stored before this call, and
        those of puts in progress. Call it with None from time to time, to note in the folder what could not be noted
        before."""
        with self._turn:
            if order is not None and order.newest > self.generation:
                self._remove(order)
            self._note()

    def _remove(self, order: Forgotten) -> None:
        catalog, applied = self._catalog, self._records.applied
        tenants: set[str] | None = None
        if order.floor <= applied.newest:
            tenants = {name for name, last in order.tenants.items() if last > applied.generation_of(name)}

        def concerns(tenant: str) -> bool:
            return tenants is None or tenant in tenants

        with catalog.lock:
            self._intake.forget(applied.merged(order), concerns)
            catalog.tallies.forget(concerns)
            sequence = catalog.store.newest_sequence if catalog.store is not None else 0
            end = catalog.index.slots
            catalog.leaving = Leaving(end, concerns)
        try:
            removed = self._remove_chunks(end)
        finally:
            with catalog.lock:
                catalog.leaving = None
        self._records = self._records.with_applied(order, tenants, sequence)
        if removed:
            log.info("%s removed %d chunks of forgotten tenants", catalog.node_id, removed)

    def _remove_chunks(self, end: int) -> int:
        """Removes the leaving chunks, which are in slots below `end`."""
        catalog, index = self._catalog, self._catalog.index
        slot = removed = 0
        while slot < end:
            with locked_slice(catalog.lock, first=not slot):
                last, most = min(end, slot + SLICE_CHUNKS), removed + REMOVED_CHUNKS
                while slot < last and removed < most:
                    if index.is_linked(slot) and catalog.is_leaving(slot):
                        if slot in catalog.writing:
                            self._busy.add(slot)
                        catalog.remove(slot)
                        catalog.counters.deletes += 1
                        removed += 1
                    slot += 1
        return removed

    def _note(self) -> None:
        """Notes in the folder what is applied, once the writes of removed chunks that are in progress on disk have
        ended and have tombstones. It does not wait for readers, or for puts whose bytes have not all come."""
        catalog, store = self._catalog, self._catalog.store
        if store is None or self._noted is self._records:
            return
        with catalog.lock:
            index = catalog.index
            self._busy = {
                slot for slot in self._busy if slot in catalog.writing and not index.is_linked(slot)
            }
            if self._busy or self._intake.is_forgetting:
                return
        try:
            self._disk.write_tombstones()
            self._disk.sync()
            store.keep_forgotten(self._records)
        except DiskError as error:
            if str(error) != self._failure:
                log.warning("%s cannot note that it has forgotten tenants: %s", catalog.node_id, error)
            self._failure = str(error)
        else:
            self._noted, self._failure = self._records, ""
