"""Whether what a storage node knows of its chunks agrees with itself."""

from collections.abc import Sequence

from kvstore_cluster.arena import Extent
from kvstore_cluster.catalog import ChunkCatalog
from kvstore_cluster.eviction.columns import NO_SLOT
from kvstore_cluster.index import NOWHERE
from kvstore_codec.errors import StorageError


def check_integrity(catalog: ChunkCatalog, reserved: Sequence[Extent]) -> None:
    """Raises StorageError unless every block of memory is owned once, by a chunk or as `reserved` for a put, and the
    index, both eviction orders, the quotas and the texts name the same chunks, and nothing is kept of others. Lock
    held."""
    index, node_id = catalog.index, catalog.node_id
    extents = [extent for extent in index.extent if extent is not None]
    catalog.arena.check_integrity([*extents, *catalog.dropped_extents(), *reserved])
    in_memory = {slot for slot in index if index.extent[slot] is not None}
    on_disk = {slot for slot in index if index.location[slot] != NOWHERE}
    if (set(catalog.in_memory), set(catalog.on_disk)) != (in_memory, on_disk):
        raise StorageError(f"{node_id}: index and eviction order name different chunks")
    if in_memory | on_disk != set(index) or len(set(index)) != len(index):
        raise StorageError(f"{node_id}: the index names a chunk that lies nowhere")
    if not catalog.dirty.keys() <= in_memory - on_disk:
        raise StorageError(f"{node_id}: a chunk waits for a disk that it is on, or is not in memory")
    for slot, extent in enumerate(index.extent):
        if extent is not None and not (index.is_linked(slot) or catalog.is_acquired(slot)):
            raise StorageError(f"{node_id}: a chunk that has gone and is not read keeps its memory")
    if not catalog.pinned | catalog.unreadable | catalog.disk_headers.keys() <= set(index):
        raise StorageError(f"{node_id}: something is kept of a chunk that has gone")
    if sorted(index.expiries) != [slot for slot in index if index.expires_at_s(slot)]:
        raise StorageError(f"{node_id}: other chunks are to expire than have a time")
    for slot in index:
        before = index.texts.before(slot)
        if before != NO_SLOT and not (index.is_linked(before) and index.tenant(before) == index.tenant(slot)):
            raise StorageError(f"{node_id}: a chunk stands behind one that is not here or another tenant's")
    catalog.in_memory.check_integrity()
    catalog.on_disk.check_integrity()
    catalog.quotas.check_integrity()
