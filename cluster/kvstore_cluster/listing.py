"""Lists the stored variants of a storage node in pages."""

from itertools import islice

from kvstore_cluster.catalog import ChunkCatalog
from kvstore_cluster.index import NOWHERE
from kvstore_cluster.slices import locked_slice
from kvstore_cluster.stored import StoredVariant

MAX_LISTED = 4096
MOST_BEHIND = 16
"""Most predecessors in its text that a list or a put names for a chunk."""


def list_variants(
    catalog: ChunkCatalog, cursor: int, limit: int, content_prefix: bytes, tenant: str | None, now_s: float
) -> tuple[list[StoredVariant], int]:
    """One page, as `StorageNode.list` defines it, at unix time `now_s`. Call without the lock."""
    index = catalog.index
    listed: list[StoredVariant] = []
    while len(listed) < limit:
        with locked_slice(catalog.lock, first=not cursor):
            slots = index.slots
            for slot in range(cursor, min(cursor + MAX_LISTED, slots)):
                cursor = slot + 1
                if (
                    index.is_linked(slot)
                    and index.content_id(slot).startswith(content_prefix)
                    and tenant in (None, index.tenant(slot))
                ):
                    listed.append(_variant(catalog, slot, now_s))
                    if len(listed) == limit:
                        break
        if cursor >= slots:
            return listed, 0
    return listed, cursor


def _variant(catalog: ChunkCatalog, slot: int, now_s: float) -> StoredVariant:
    index = catalog.index
    expires_at_s = index.expires_at_s(slot)
    return StoredVariant(
        index.chunk_id(slot),
        index.encoding(slot),
        index.size_bytes[slot],
        index.calibration(slot),
        in_memory=index.extent[slot] is not None,
        on_disk=index.location[slot] != NOWHERE,
        pinned=slot in catalog.pinned,
        ttl_left_s=max(1, round(expires_at_s - now_s)) if expires_at_s else 0,
        tenant=index.tenant(slot),
        cost=index.cost(slot),
        number=index.texts.number[slot],
        behind=tuple(map(index.chunk_id, islice(index.texts.all_before(slot), MOST_BEHIND))),
    )
