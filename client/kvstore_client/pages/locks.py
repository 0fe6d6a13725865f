"""Locks on pages: stored pages stay leased until their caller unlocks them."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from kvstore_client.pages.find import StoredPage
from kvstore_client.replicas import Lease
from kvstore_codec.identity import ChunkId

MOST_LOCKED = 1 << 18
"""Maximum number of locks; beyond that the oldest are released."""


@dataclass(slots=True, eq=False)
class _Hold:
    """A lease, and how many of its pages are still locked."""

    lease: Lease
    pages: list[ChunkId]
    until_s: float
    left: int


class PageLocks:
    """Thread-safe. A page found twice is locked twice. Locks end when their lease expires."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holds: deque[_Hold] = deque()
        """Oldest first. Holds without locks are removed when they are the oldest."""
        self._locked: dict[bytes, deque[tuple[_Hold, StoredPage]]] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, lease: Lease, pages: Mapping[ChunkId, StoredPage], lease_s: float) -> list[Lease]:
        """Lock pages that were found under one lease. Returns the leases to release for lack of room."""
        hold = _Hold(lease, list(pages), time.monotonic() + lease_s, len(pages))
        with self._lock:
            self._holds.append(hold)
            self._count += len(pages)
            for chunk_id, page in pages.items():
                self._locked.setdefault(chunk_id.content_id, deque()).append((hold, page))
            return self._trim()

    def find(self, chunk_id: ChunkId) -> StoredPage | None:
        """A locked page's location; None for a page that is not locked."""
        with self._lock:
            locks = self._locked.get(chunk_id.content_id)
            if not locks or locks[-1][0].until_s <= time.monotonic():
                return None
            return locks[-1][1]

    def release(self, chunk_ids: Iterable[ChunkId]) -> list[Lease]:
        """Remove one lock from each page that has one. Returns the leases without locked pages."""
        over: list[Lease] = []
        with self._lock:
            for chunk_id in chunk_ids:
                locks = self._locked.get(chunk_id.content_id)
                if not locks:
                    continue
                hold, _ = locks.popleft()
                if not locks:
                    del self._locked[chunk_id.content_id]
                self._count -= 1
                hold.left -= 1
                if not hold.left:
                    over.append(hold.lease)
            self._trim()
        return over

    def clear(self) -> list[Lease]:
        """Remove all locks. Returns their leases."""
        with self._lock:
            over = [hold.lease for hold in self._holds if hold.left]
            self._holds.clear()
            self._locked.clear()
            self._count = 0
        return over

    def _trim(self) -> list[Lease]:
        """Drop the oldest holds that are unlocked, expired, or too many. Returns the leases of the last kind."""
        now_s, released = time.monotonic(), []
        while self._holds:
            oldest = self._holds[0]
            if oldest.left and oldest.until_s > now_s and self._count <= MOST_LOCKED:
                break
            self._holds.popleft()
            if oldest.left and oldest.until_s > now_s:
                released.append(oldest.lease)
            if oldest.left:
                self._drop(oldest)
        return released

    def _drop(self, hold: _Hold) -> None:
        for chunk_id in hold.pages:
            locks = self._locked.get(chunk_id.content_id)
            # The oldest hold's locks are the first of each page.
            if locks and locks[0][0] is hold:
                locks.popleft()
                self._count -= 1
                if not locks:
                    del self._locked[chunk_id.content_id]
        hold.left = 0
