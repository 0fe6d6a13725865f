"""Checks that the metadata of a storage node is consistent."""

from collections import Counter
from collections.abc import Sequence

from kvstore_cluster.arena import Extent
from kvstore_cluster.catalog import ChunkCatalog
from kvstore_cluster.eviction.columns import NO_SLOT
from kvstore_cluster.index import NOWHERE
from kvstore_cluster.tallies import Tier, family
from kvstore_codec.errors import StorageError


def check_integrity(catalog: ChunkCatalog, reserved: Sequence[Extent]) -> None:
    """Raises StorageError unless every block of memory is free, in one chunk or `reserved` for one put, the index, both
    eviction orders, the quotas and the texts have the same chunks, and no state of removed chunks is left. Examines
    every chunk. Call with the lock held."""
    index, node_id = catalog.index, catalog.node_id
    extents = [extent for extent in index.extent if extent is not None]
    catalog.arena.check_integrity([*extents, *catalog.dropped_extents(), *reserved])
    in_memory = {slot for slot in index if index.extent[slot] is not None}
    on_disk = {slot for slot in index if index.location[slot] != NOWHERE}
    if (set(catalog.in_memory), set(catalog.on_disk)) != (in_memory, on_disk):
        raise StorageError(f"{node_id}: the index and the eviction orders have different chunks")
    if in_memory | on_disk != set(index) or len(set(index)) != len(index):
        raise StorageError(
            f"{node_id}: the index has a chunk that is neither in memory nor on disk, or has one twice"
        )
    if not catalog.dirty.keys() <= in_memory - on_disk:
        raise StorageError(
            f"{node_id}: a chunk that waits for write-back is on disk already, or not in memory"
        )
    for slot, extent in enumerate(index.extent):
        if extent is not None and not (index.is_linked(slot) or catalog.is_acquired(slot)):
            raise StorageError(f"{node_id}: a removed chunk that nobody reads still occupies memory")
    if not catalog.pinned | catalog.unreadable | catalog.disk_headers.keys() <= set(index):
        raise StorageError(
            f"{node_id}: a pin, a disk header or an unreadable mark is left of a removed chunk"
        )
    if sorted(index.expiries) != [slot for slot in index if index.expires_at_s(slot)]:
        raise StorageError(f"{node_id}: the expiry queue and the expiry times have different chunks")
    for slot in index:
        before = index.texts.before(slot)
        if before != NO_SLOT and not (index.is_linked(before) and index.tenant(before) == index.tenant(slot)):
            raise StorageError(f"{node_id}: the predecessor of a chunk is missing or has another tenant")
    stored: Counter[tuple[Tier, str]] = Counter()
    for tier, slots in ((Tier.MEMORY, in_memory), (Tier.DISK, on_disk)):
        for slot in slots:
            stored[tier, family(index.encoding(slot))] += index.size_bytes[slot]
    if stored != catalog.tallies.stored_bytes:
        raise StorageError(f"{node_id}: {dict(stored)} bytes are stored, but others are counted")
    catalog.in_memory.check_integrity()
    catalog.on_disk.check_integrity()
    catalog.quotas.check_integrity()
