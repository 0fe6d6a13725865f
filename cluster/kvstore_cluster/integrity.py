"""Whether what a storage node knows of its chunks agrees with itself."""

from collections.abc import Sequence

from kvstore_cluster.arena import Extent
from kvstore_cluster.eviction.columns import NO_SLOT
from kvstore_cluster.index import NOWHERE
from kvstore_cluster.tiers import Tiers
from kvstore_codec.errors import StorageError


def check_integrity(tiers: Tiers, reserved: Sequence[Extent]) -> None:
    """Raises StorageError unless every block of memory is owned once, by a chunk or as `reserved` for a put, and the
    index, both eviction orders, the quotas and the texts name the same chunks. The caller has the lock."""
    index, node_id = tiers.index, tiers.node_id
    extents = [extent for extent in index.extent if extent is not None]
    tiers.arena.check_integrity([*extents, *tiers.dropped_extents(), *reserved])
    in_memory = {slot for slot in index if index.extent[slot] is not None}
    on_disk = {slot for slot in index if index.location[slot] != NOWHERE}
    if (set(tiers.in_memory), set(tiers.on_disk)) != (in_memory, on_disk):
        raise StorageError(f"{node_id}: index and eviction order name different chunks")
    if in_memory | on_disk != set(index) or len(set(index)) != len(index):
        raise StorageError(f"{node_id}: the index names a chunk that lies nowhere")
    if not tiers.dirty.keys() <= in_memory - on_disk:
        raise StorageError(f"{node_id}: a chunk waits for a disk that it is on, or is not in memory")
    if sorted(index.expiries) != [slot for slot in index if index.expires_at_s(slot)]:
        raise StorageError(f"{node_id}: other chunks are to expire than have a time")
    for slot in index:
        before = index.texts.before(slot)
        if before != NO_SLOT and not (index.listed(before) and index.tenant(before) == index.tenant(slot)):
            raise StorageError(f"{node_id}: a chunk stands behind one that is not here or another tenant's")
    tiers.in_memory.check_integrity()
    tiers.on_disk.check_integrity()
    tiers.quotas.check_integrity()
