"""The memory tier of a storage node: reserves memory for chunks, and verifies chunks in memory."""

import time

from kvstore_cluster.arena import Extent
from kvstore_cluster.catalog import ChunkCatalog
from kvstore_cluster.disk_reads import require_sound
from kvstore_cluster.eviction.columns import NO_SLOT
from kvstore_cluster.eviction.texts import Choice
from kvstore_cluster.index import NOWHERE
from kvstore_codec.errors import ArenaFullError, ChunkFormatError, TextTooLongError


class MemoryTier:
    """Chunks in the arena. Each method states its lock requirements, in the terms defined in `catalog.py`."""

    def __init__(self, catalog: ChunkCatalog) -> None:
        self._catalog = catalog
        self._arena = catalog.arena

    def reserve(
        self,
        size_bytes: int,
        *,
        before: int = NO_SLOT,
        may_demote_before: bool = True,
        patience_s: float = 0.0,
    ) -> Extent:
        """Allocates memory for a chunk. Demotes or evicts unprotected chunks to make room.

        `before`, the chunk before it in its text, is never evicted. It may be demoted if it is or will be on disk and
        `may_demote_before` is set. Raises ArenaFullError when all chunks are protected, and TextTooLongError when only
        `before` is left to evict. In both cases nothing was evicted.

        Lock held. Waits up to `patience_s` for dirty chunks to be written to disk, and releases the lock while it
        waits.
        """
        catalog, arena = self._catalog, self._arena
        needed_bytes = arena.footprint_bytes(size_bytes)
        deadline_s = time.monotonic() + patience_s
        while True:
            missing_bytes = needed_bytes - (arena.capacity_bytes - arena.used_bytes)
            if missing_bytes <= 0:
                return arena.allocate(size_bytes)
            stays = before != NO_SLOT and (
                before in catalog.dirty or catalog.index.location[before] != NOWHERE
            )
            choice = self._make_room(missing_bytes, NO_SLOT if stays and may_demote_before else before)
            if choice is None:
                return arena.allocate(size_bytes)
            if choice.own_text:
                raise TextTooLongError(
                    f"{catalog.node_id} keeps the beginning of a text rather than what follows it, and has nothing "
                    f"else to evict from its {arena.capacity_bytes} bytes of memory; give the node more memory"
                )
            patience_s = deadline_s - time.monotonic()
            if not catalog.dirty or patience_s <= 0:
                raise ArenaFullError(
                    f"{catalog.node_id} has no room for {needed_bytes} bytes: all that is stored in its "
                    f"{arena.capacity_bytes} bytes is leased, pinned, being read or being written; retry later "
                    "or give the node more memory"
                )
            catalog.lock.wait(patience_s)

    def demote(self, high: float, low: float) -> None:
        """Demotes chunks until at most the share `low` of memory is used, if at least the share `high` is used now.
        Chunks that are not on disk stay. Lock held."""
        catalog, capacity_bytes = self._catalog, self._arena.capacity_bytes
        if self._arena.used_bytes < high * capacity_bytes:
            return
        excess_bytes = self._arena.used_bytes - low * capacity_bytes
        choice = catalog.choose(catalog.in_memory, excess_bytes, self._footprint_bytes, catalog.may_demote)
        for slot in choice.victims:
            catalog.leave_memory(slot)

    def verify(self, slot: int) -> str | None:
        """Verifies the memory copy of an acquired chunk. Returns why it is damaged, or None when it is sound or absent.
        Drops a damaged copy. Call without the lock."""
        extent = self._catalog.index.extent[slot]
        if extent is None:
            return None
        try:
            require_sound(self._catalog.index, slot, list(self._arena.views(extent)))
        except ChunkFormatError as error:
            with self._catalog.lock:
                self._catalog.drop_memory_copy(slot, extent)
            return f"in memory: {error}"
        return None

    def _make_room(self, missing_bytes: int, spared: int) -> Choice | None:
        """Frees `missing_bytes` and returns None. Frees nothing and returns the choice when it is too small."""
        catalog = self._catalog
        catalog.leases.expire()
        choice = catalog.choose(
            catalog.in_memory, missing_bytes, self._footprint_bytes, catalog.may_leave_memory, spared=spared
        )
        if sum(map(self._footprint_bytes, choice.victims)) < missing_bytes:
            return choice
        for slot in choice.victims:
            catalog.leave_memory(slot)
        return None

    def _footprint_bytes(self, slot: int) -> int:
        return self._arena.footprint_bytes(self._catalog.index.size_bytes[slot])
