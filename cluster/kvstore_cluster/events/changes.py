"""Remembers which chunks of a node entered or left a tier."""

import threading

from kvstore_cluster.events.base import IN_MEMORY, ON_DISK, Taken
from kvstore_cluster.index import NOWHERE, ChunkIndex
from kvstore_cluster.slices import SLICE_CHUNKS, locked_slice
from kvstore_codec.identity import ChunkId, ContentId, PrefixId

MOST_CHANGED = 1 << 16
"""Most chunks that are remembered, about 15 MB. Beyond that, all chunks of the node are reported again."""


class TierChanges:
    """Chunks whose tiers changed since they were last taken. Only the chunks are remembered, not the changes: their
    state is determined when it is taken. So a change costs its caller one entry in a table, repeated changes cost no
    memory, and what was lost underway is made good by taking the same chunks again."""

    def __init__(self, index: ChunkIndex, lock: threading.Condition, most: int = MOST_CHANGED) -> None:
        """`lock` guards the index and the changes."""
        self._index, self._lock, self._most = index, lock, most
        self._changed: dict[tuple[str, bytes], ContentId] = {}  # by tenant and prefix id
        self._next_slot: int | None = None  # while all chunks are reported again
        self._some = threading.Event()
        self._overflows = 0

    @property
    def overflows(self) -> int:
        """How often more chunks changed than are remembered."""
        return self._overflows

    def add(self, slot: int) -> None:
        """Records that the chunk entered or left a tier. Lock held."""
        if len(self._changed) >= self._most:
            self._overflows += 1
            self._report_all()
        index = self._index
        self._changed[index.tenant(slot), index.prefix_id(slot)] = index.content_id(slot)
        if not self._some.is_set():
            self._some.set()

    def report_all(self) -> None:
        """Reports all chunks again, from now on. Call without the lock."""
        with self._lock:
            self._report_all()

    def wait(self, timeout_s: float) -> bool:
        """Waits until there is something to take, for at most `timeout_s`, and returns whether there is. Call without
        the lock."""
        return self._some.wait(timeout_s)

    def take(self) -> Taken:
        """State of some chunks that changed. Call without the lock."""
        states: dict[str, dict[bytes, int]] = {}
        with locked_slice(self._lock, first=False):
            from_scratch = self._next_slot == 0
            if self._next_slot is not None:
                self._walk(self._next_slot, states)
            for _ in range(min(SLICE_CHUNKS, len(self._changed))):
                (tenant, block), content_id = self._changed.popitem()
                chunk_id = ChunkId(content_id, PrefixId(block))
                states.setdefault(tenant, {})[block] = self._tiers(tenant, chunk_id)
            complete = self._next_slot is None
            more = bool(self._changed) or not complete
            if not more:
                self._some.clear()
        return Taken(states, from_scratch, complete, more)

    def _report_all(self) -> None:
        self._changed.clear()
        self._next_slot = 0
        self._some.set()

    def _walk(self, begin: int, states: dict[str, dict[bytes, int]]) -> None:
        index = self._index
        end = min(begin + SLICE_CHUNKS, index.slots)
        for slot in index.linked(range(begin, end)):
            tenant, chunk_id = index.tenant(slot), index.chunk_id(slot)
            states.setdefault(tenant, {})[chunk_id.prefix_id] = self._tiers(tenant, chunk_id)
        self._next_slot = None if end == index.slots else end

    def _tiers(self, tenant: str, chunk_id: ChunkId) -> int:
        index, tiers = self._index, 0
        for slot in index.variants(chunk_id, tenant):
            if index.tenant(slot) == tenant:
                tiers |= IN_MEMORY if index.extent[slot] is not None else 0
                tiers |= ON_DISK if index.location[slot] != NOWHERE else 0
        return tiers
