"""Leases: a leased chunk is not evicted while a client fetches it."""

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
"""Limit of the keys in all leases of a table and in their expected uses. A key in several leases counts once in each. A
key takes 100 to 200 bytes."""
MAX_LEASED_OF_TENANT = 3 << 18
"""Of these, most of one tenant."""
_OWN_KEYS = 8
"""Fixed cost of a lease, in keys."""
_MOST_STALE = 1024
"""Stale entries that the expiry heap may keep, besides two entries for each lease."""


@dataclass(frozen=True, slots=True)
class Findings(Generic[K]):
    """Result of a lookup whose uses are reported later: the keys, the number of the answer that each key belongs to,
    and the numbers of the approximate answers, which are in another context than the requested one."""

    keys: list[K]
    answers: Sequence[int]
    approximate: Set[int] = field(default_factory=frozenset)

    def used(self, bits: bytes) -> "Findings[K]":
        """The findings of used answers. Bit i % 8 of byte i / 8 of `bits`, lowest bit first, stands for answer i."""
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
    owner: str = ""
    expires_s: float = 0.0
    findings: Findings[K] | None = None


class LeaseTable(Generic[K]):
    """Grants leases over sets of keys. Not thread-safe: called with the storage node's lock held.

    A lease ends when it is released or expires. `max_lease_s` caps every grant and renewal, so that a client that dies
    cannot hold memory for longer. `max_leased` limits the keys in all leases together, and `max_leased_of_tenant` those
    of one tenant. `clock` is monotonic, in seconds.
    """

    def __init__(
        self,
        max_lease_s: float = MAX_LEASE_S,
        clock: Callable[[], float] = time.monotonic,
        max_leased: int = MAX_LEASED,
        max_leased_of_tenant: int = MAX_LEASED_OF_TENANT,
    ) -> None:
        self._max_lease_s = max_lease_s
        self._max_leased, self._max_leased_of_tenant = max_leased, max_leased_of_tenant
        self._leased = 0
        self._leased_of: Counter[str] = Counter()
        self._clock = clock
        self._leases: dict[LeaseId, _Lease[K]] = {}
        self._holders: Counter[K] = Counter()
        # A heap of (expiry, lease). An entry whose expiry differs from its lease's is stale: the lease was renewed.
        self._expiries: list[tuple[float, LeaseId]] = []

    def grant(self, keys: Iterable[K], duration_s: float, owner: str = "") -> LeaseId | None:
        """Grants a lease on the keys to a tenant. None when that would exceed the limit of leased keys."""
        lease: _Lease[K] = _Lease(set(keys), owner)
        if not self._take(owner, _OWN_KEYS + len(lease.keys)):
            return None
        lease_id = LeaseId(secrets.token_bytes(LEASE_ID_BYTES))
        self._leases[lease_id] = lease
        self._holders.update(lease.keys)
        self._schedule(lease_id, duration_s)
        return lease_id

    def belongs_to(self, lease_id: LeaseId, owner: str | None) -> bool:
        """Whether the lease was granted to the tenant `owner`; for None, to any tenant. False when it has ended."""
        lease = self._leases.get(lease_id)
        return lease is not None and owner in (None, lease.owner)

    def owner(self, lease_id: LeaseId) -> str:
        """The tenant that the lease was granted to. The default tenant, empty, when it has ended."""
        lease = self._leases.get(lease_id)
        return "" if lease is None else lease.owner

    def cover(
        self, lease_id: LeaseId | None, keys: Iterable[K], duration_s: float, owner: str = ""
    ) -> LeaseId | None:
        """Adds keys to a lease and keeps its expiry. Grants a new lease for `duration_s` when `lease_id` is None or has
        ended. Returns the lease that covers the keys. Ends the lease and returns None when the keys would exceed the
        limit of leased keys."""
        lease = self._leases.get(lease_id) if lease_id is not None else None
        if lease_id is None or lease is None:
            return self.grant(keys, duration_s, owner)
        added = set(keys) - lease.keys
        if not self._take(lease.owner, len(added)):
            self.release(lease_id)
            return None
        lease.keys |= added
        self._holders.update(added)
        return lease_id

    def expect_use(self, lease_id: LeaseId, findings: Findings[K]) -> None:
        """Lets the holder of the lease report later which of `findings`, the keys of the lease, it uses. Has no effect
        when that would exceed the limit of leased keys: the lease then covers all its keys until it ends, and no use is
        counted."""
        lease = self._leases.get(lease_id)
        if lease is not None and self._take(lease.owner, len(findings.keys)):
            lease.findings = findings

    def expected_use(self, lease_id: LeaseId) -> Findings[K] | None:
        """Returns and removes the findings of the lease. None when the lease has ended or has no findings (left)."""
        self.expire()
        lease = self._leases.get(lease_id)
        if lease is None:
            return None
        return self._pop_findings(lease)

    def narrow(self, lease_id: LeaseId, keys: Iterable[K]) -> bool:
        """Removes all keys but these from the lease. False when it has ended."""
        lease = self._leases.get(lease_id)
        if lease is None:
            return False
        others = lease.keys.difference(keys)
        lease.keys -= others
        self._let_go(lease.owner, others)
        if not lease.keys:
            self.release(lease_id)
        return True

    def renew(self, lease_id: LeaseId, duration_s: float) -> bool:
        """Extends the lease to `duration_s` from now. False when it has ended."""
        self.expire()
        if lease_id not in self._leases:
            return False
        self._schedule(lease_id, duration_s)
        return True

    def release(self, lease_id: LeaseId) -> bool:
        """Ends the lease. False when it has already ended."""
        lease = self._leases.pop(lease_id, None)
        if lease is None:
            return False
        self._let_go(lease.owner, lease.keys)
        self._pop_findings(lease)
        self._give_back(lease.owner, _OWN_KEYS)
        return True

    def expire(self) -> None:
        """Ends every lease that has expired."""
        now = self._clock()
        while self._expiries and self._expiries[0][0] <= now:
            expires_s, lease_id = heapq.heappop(self._expiries)
            lease = self._leases.get(lease_id)
            if lease is not None and lease.expires_s == expires_s:
                self.release(lease_id)

    def holds(self, key: K) -> bool:
        """Whether a lease covers `key`. Expired leases count until the next `expire`."""
        return key in self._holders

    def __len__(self) -> int:
        return len(self._leases)

    def _take(self, owner: str, count: int) -> bool:
        """Counts `count` more leased keys of a tenant. Counts none and returns False when they would exceed a limit."""
        if (
            self._leased + count > self._max_leased
            or self._leased_of[owner] + count > self._max_leased_of_tenant
        ):
            return False
        self._leased += count
        self._leased_of[owner] += count
        return True

    def _give_back(self, owner: str, count: int) -> None:
        self._leased -= count
        self._leased_of[owner] -= count
        if not self._leased_of[owner]:
            del self._leased_of[owner]

    def _pop_findings(self, lease: _Lease[K]) -> Findings[K] | None:
        findings, lease.findings = lease.findings, None
        if findings is not None:
            self._give_back(lease.owner, len(findings.keys))
        return findings

    def _let_go(self, owner: str, keys: Set[K]) -> None:
        self._give_back(owner, len(keys))
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
