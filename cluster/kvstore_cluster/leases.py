"""Leases: promises that chunks are not evicted while somebody fetches them."""

import heapq
import secrets
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence, Set
from dataclasses import dataclass, field
from typing import Generic, NewType, TypeVar

import numpy as np

K = TypeVar("K", bound=Hashable)
LeaseId = NewType("LeaseId", bytes)

LEASE_ID_BYTES = 16
MAX_LEASE_S = 120.0
MAX_LEASED = 1 << 20
"""Keys that all leases of a table cover, each lease its own, and those whose use is expected: 100 to 200 bytes each."""
_OWN_KEYS = 8
"""A lease counts as so many keys, besides those that it covers."""
_MOST_STALE = 1024
"""Expiries of leases that were renewed or released since, besides one for each lease."""


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
    keys: set[K]
    expires_s: float = 0.0
    findings: Findings[K] | None = None


class LeaseTable(Generic[K]):
    """Grants leases over sets of keys. Not thread-safe: called under the storage node's lock.

    A lease ends when it is released or when its time is over; `max_lease_s` caps every grant and renewal, so
    a client that dies cannot hold memory for longer than that. All leases together cover `max_leased` keys at most.
    `clock` is monotonic, in seconds.
    """

    def __init__(
        self,
        max_lease_s: float = MAX_LEASE_S,
        clock: Callable[[], float] = time.monotonic,
        max_leased: int = MAX_LEASED,
    ) -> None:
        self._max_lease_s = max_lease_s
        self._max_leased = max_leased
        self._leased = 0
        self._clock = clock
        self._leases: dict[LeaseId, _Lease[K]] = {}
        self._holders: Counter[K] = Counter()
        # (expiry, lease) in order; an item older than its lease's expiry was renewed since and is skipped.
        self._expiries: list[tuple[float, LeaseId]] = []

    def grant(self, keys: Iterable[K], duration_s: float) -> LeaseId | None:
        """None when so much is leased that these keys would be too many."""
        lease: _Lease[K] = _Lease(set(keys))
        if not self._take(_OWN_KEYS + len(lease.keys)):
            return None
        lease_id = LeaseId(secrets.token_bytes(LEASE_ID_BYTES))
        self._leases[lease_id] = lease
        self._holders.update(lease.keys)
        self._schedule(lease_id, duration_s)
        return lease_id

    def cover(self, lease_id: LeaseId | None, keys: Iterable[K], duration_s: float) -> LeaseId | None:
        """Adds these keys to a lease, which ends when it would have ended. Grants a new one for `duration_s` where
        there is none or it has ended. Returns the lease that holds the keys; None when there are too many, and then the
        lease has ended."""
        lease = self._leases.get(lease_id) if lease_id is not None else None
        if lease_id is None or lease is None:
            return self.grant(keys, duration_s)
        added = set(keys) - lease.keys
        if not self._take(len(added)):
            self.release(lease_id)
            return None
        lease.keys |= added
        self._holders.update(added)
        return lease_id

    def expect_use(self, lease_id: LeaseId, findings: Findings[K]) -> None:
        """Its holder will say what of that, which is all that the lease covers, is used. Has no effect when so much is
        leased that this would be too much: then the lease covers all until it ends, and nothing counts as used."""
        lease = self._leases.get(lease_id)
        if lease is not None and self._take(len(findings.keys)):
            lease.findings = findings

    def expected_use(self, lease_id: LeaseId) -> Findings[K] | None:
        """What was found, once; None when the lease has ended, or when that was not expected or said already."""
        self.expire()
        lease = self._leases.get(lease_id)
        if lease is None:
            return None
        return self._pop_findings(lease)

    def narrow(self, lease_id: LeaseId, keys: Iterable[K]) -> bool:
        """The lease covers only these of its keys from now on; False when it has ended."""
        lease = self._leases.get(lease_id)
        if lease is None:
            return False
        others = lease.keys.difference(keys)
        lease.keys -= others
        self._let_go(others)
        if not lease.keys:
            self.release(lease_id)
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
        self._pop_findings(lease)
        self._leased -= _OWN_KEYS
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

    def _take(self, count: int) -> bool:
        """Counts so many more keys, unless they would be too many."""
        if self._leased + count > self._max_leased:
            return False
        self._leased += count
        return True

    def _pop_findings(self, lease: _Lease[K]) -> Findings[K] | None:
        findings, lease.findings = lease.findings, None
        if findings is not None:
            self._leased -= len(findings.keys)
        return findings

    def _let_go(self, keys: Set[K]) -> None:
        self._leased -= len(keys)
        for key in keys:
            self._holders[key] -= 1
            if not self._holders[key]:
                del self._holders[key]

    def _schedule(self, lease_id: LeaseId, duration_s: float) -> None:
        expires_s = self._clock() + min(duration_s, self._max_lease_s)
        self._leases[lease_id].expires_s = expires_s
        heapq.heappush(self._expiries, (expires_s, lease_id))
        if len(self._expiries) > _MOST_STALE + 2 * len(self._leases):
            self._expiries = [(lease.expires_s, name) for name, lease in self._leases.items()]
            heapq.heapify(self._expiries)
