"""Leases: promises that chunks are not evicted while somebody fetches them."""

import heapq
import secrets
import time
from collections import Counter
from collections.abc import Callable, Collection, Hashable
from dataclasses import dataclass
from typing import Generic, NewType, TypeVar

K = TypeVar("K", bound=Hashable)
LeaseId = NewType("LeaseId", bytes)

LEASE_ID_BYTES = 16
MAX_LEASE_S = 120.0


@dataclass(slots=True)
class _Lease(Generic[K]):
    keys: list[K]
    expires_s: float


class LeaseTable(Generic[K]):
    """Grants leases over sets of keys. Not thread-safe: called under the storage node's lock.

    A lease ends when it is released or when its time is over; `max_lease_s` caps every grant and renewal, so
    a client that dies cannot hold memory for longer than that. `clock` is monotonic, in seconds.
    """

    def __init__(self, max_lease_s: float = MAX_LEASE_S, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_lease_s = max_lease_s
        self._clock = clock
        self._leases: dict[LeaseId, _Lease[K]] = {}
        self._holders: Counter[K] = Counter()
        # (expiry, lease) in order; an item older than its lease's expiry was renewed since and is skipped.
        self._expiries: list[tuple[float, LeaseId]] = []

    def grant(self, keys: Collection[K], duration_s: float) -> LeaseId:
        lease_id = LeaseId(secrets.token_bytes(LEASE_ID_BYTES))
        self._leases[lease_id] = _Lease(list(keys), 0.0)
        self._holders.update(keys)
        self._schedule(lease_id, duration_s)
        return lease_id

    def cover(self, lease_id: LeaseId | None, keys: Collection[K], duration_s: float) -> LeaseId:
        """Adds these keys to a lease, which ends when it would have ended. Grants a new one for `duration_s` where
        there is none or it has ended. Returns the lease that holds the keys."""
        if lease_id is None or lease_id not in self._leases:
            return self.grant(keys, duration_s)
        self._leases[lease_id].keys.extend(keys)
        self._holders.update(keys)
        return lease_id

    def renew(self, lease_id: LeaseId, duration_s: float) -> bool:
        """Lets the lease run `duration_s` from now; False when it has ended."""
        self.expire()
        if lease_id not in self._leases:
            return False
        self._schedule(lease_id, duration_s)
        return True

    def release(self, lease_id: LeaseId) -> bool:
        """Ends the lease; False when it has ended already."""
        lease = self._leases.pop(lease_id, None)
        if lease is None:
            return False
        for key in lease.keys:
            self._holders[key] -= 1
            if not self._holders[key]:
                del self._holders[key]
        return True

    def expire(self) -> None:
        """Ends every lease whose time is over."""
        now = self._clock()
        while self._expiries and self._expiries[0][0] <= now:
            expires_s, lease_id = heapq.heappop(self._expiries)
            lease = self._leases.get(lease_id)
            if lease is not None and lease.expires_s == expires_s:
                self.release(lease_id)

    def holds(self, key: K) -> bool:
        """Whether a lease covers `key`, as of the last `expire`."""
        return key in self._holders

    def __len__(self) -> int:
        return len(self._leases)

    def _schedule(self, lease_id: LeaseId, duration_s: float) -> None:
        expires_s = self._clock() + min(duration_s, self._max_lease_s)
        self._leases[lease_id].expires_s = expires_s
        heapq.heappush(self._expiries, (expires_s, lease_id))
