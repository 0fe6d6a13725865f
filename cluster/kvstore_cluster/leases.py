"""Leases: promises that chunks are not evicted while somebody fetches them."""

import heapq
import secrets
import time
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Sequence, Set
from dataclasses import dataclass, field
from typing import Generic, NewType, TypeVar

import numpy as np

K = TypeVar("K", bound=Hashable)
LeaseId = NewType("LeaseId", bytes)

LEASE_ID_BYTES = 16
MAX_LEASE_S = 120.0


@dataclass(frozen=True, slots=True)
class Findings(Generic[K]):
    """What a lookup found, for who says later what of it is used: the keys, with each the number of the answer that it
    is part of, and the numbers of answers in another context than was asked for."""

    keys: list[K]
    answers: Sequence[int]
    approximate: Set[int] = field(default_factory=frozenset)

    def used(self, bits: bytes) -> "Findings[K]":
        """Only what belongs to answers whose bit is set: bit i % 8 of byte i / 8, the lowest first."""
        set_bits = np.unpackbits(np.frombuffer(bits, np.uint8), bitorder="little").tolist()
        answers = len(set_bits)
        kept = [
            (key, answer)
            for key, answer in zip(self.keys, self.answers, strict=True)
            if answer < answers and set_bits[answer]
        ]
        numbers = [answer for _, answer in kept]
        return Findings([key for key, _ in kept], numbers, self.approximate & set(numbers))


@dataclass(slots=True)
class _Lease(Generic[K]):
    keys: list[K]
    expires_s: float
    findings: Findings[K] | None = None


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

    def expect_use(self, lease_id: LeaseId, findings: Findings[K]) -> None:
        """Its holder will say what of that, which is all that the lease covers, is used."""
        if (lease := self._leases.get(lease_id)) is not None:
            lease.findings = findings

    def expected_use(self, lease_id: LeaseId) -> Findings[K] | None:
        """What was found, once; None when the lease has ended, or when that was not expected or said already."""
        self.expire()
        lease = self._leases.get(lease_id)
        if lease is None:
            return None
        findings, lease.findings = lease.findings, None
        return findings

    def narrow(self, lease_id: LeaseId, keys: list[K]) -> bool:
        """The lease covers only these of its keys from now on; False when it has ended."""
        lease = self._leases.get(lease_id)
        if lease is None:
            return False
        self._holders.update(keys)
        self._let_go(lease.keys)
        lease.keys = keys
        if not keys:
            del self._leases[lease_id]
        return True

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
        self._let_go(lease.keys)
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

    def _let_go(self, keys: Collection[K]) -> None:
        for key in keys:
            self._holders[key] -= 1
            if not self._holders[key]:
                del self._holders[key]

    def _schedule(self, lease_id: LeaseId, duration_s: float) -> None:
        expires_s = self._clock() + min(duration_s, self._max_lease_s)
        self._leases[lease_id].expires_s = expires_s
        heapq.heappush(self._expiries, (expires_s, lease_id))
