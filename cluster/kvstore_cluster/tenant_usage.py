"""Counts what each tenant stores on a node."""

from collections import defaultdict
from dataclasses import dataclass

from kvstore_cluster.catalog import ChunkCatalog
from kvstore_cluster.index import NOWHERE
from kvstore_cluster.slices import SLICE_CHUNKS, locked_slice


@dataclass(slots=True)
class TenantUsage:
    """Stored variants of a tenant and their bytes, headers included, in total and in each tier. A variant may be in
    both."""

    chunks: int = 0
    bytes: int = 0
    memory_chunks: int = 0
    memory_bytes: int = 0
    disk_chunks: int = 0
    disk_bytes: int = 0


def tenant_usage(catalog: ChunkCatalog, only: str | None) -> dict[str, TenantUsage]:
    """What each tenant stores, or the tenant `only`; tenants without chunks are left out. Examines every chunk, slice
    by slice: chunks that are stored or removed meanwhile may be counted or not. Call without the lock."""
    index = catalog.index
    found: defaultdict[str, TenantUsage] = defaultdict(TenantUsage)
    slot = 0
    while True:
        with locked_slice(catalog.lock, first=not slot):
            last = min(slot + SLICE_CHUNKS, index.slots)
            for at in index.linked(range(slot, last)):
                tenant = index.tenant(at)
                if only is not None and tenant != only:
                    continue
                usage, size_bytes = found[tenant], index.size_bytes[at]
                usage.chunks += 1
                usage.bytes += size_bytes
                if index.extent[at] is not None:
                    usage.memory_chunks += 1
                    usage.memory_bytes += size_bytes
                if index.location[at] != NOWHERE:
                    usage.disk_chunks += 1
                    usage.disk_bytes += size_bytes
            if last >= index.slots:
                return dict(found)
            slot = last
