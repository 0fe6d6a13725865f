"""Numbered batches of events of all tenants, the last ones kept for those who missed them."""

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

KEPT_BYTES = 64 << 20
KEPT_BATCHES = 1 << 16

_PLACES_PER_MS = 1 << 20


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch of events of a tenant, as it is sent."""

    tenant: str
    sequence: int
    payload: bytes


class EventLog:
    """Not thread-safe. Sequence numbers count the batches of each tenant. They begin at a number that the clock gives,
    so that those of a restarted process are larger than those of the process before it."""

    def __init__(self, kept_bytes: int = KEPT_BYTES, kept_batches: int = KEPT_BATCHES) -> None:
        self._kept_bytes, self._kept_batches = kept_bytes, kept_batches
        self._start = time.time_ns() // 1_000_000 * _PLACES_PER_MS
        self._last: dict[str, int] = {}  # by tenant
        self._batches: deque[Batch] = deque()
        self._size_bytes = 0
        self._unsent = 0  # the last ones of `_batches`
        self.appended = 0
        self.dropped = 0
        """Batches that were dropped before they were sent."""

    def last(self, tenant: str) -> int:
        """Sequence number of the tenant's last batch, or the one before its first."""
        return self._last.get(tenant, self._start)

    def append(self, tenant: str, payload: bytes) -> None:
        sequence = self._last[tenant] = self.last(tenant) + 1
        self._batches.append(Batch(tenant, sequence, payload))
        self._size_bytes += len(payload)
        self._unsent += 1
        self.appended += 1
        while self._size_bytes > self._kept_bytes or len(self._batches) > self._kept_batches:
            self._size_bytes -= len(self._batches.popleft().payload)
            if self._unsent > len(self._batches):
                self._unsent -= 1
                self.dropped += 1

    def take_unsent(self, most: int) -> list[Batch]:
        """The next batches to send, of all tenants."""
        first = len(self._batches) - self._unsent
        taken = [self._batches[first + place] for place in range(min(most, self._unsent))]
        self._unsent -= len(taken)
        return taken

    def since(self, tenant: str, sequence: int) -> list[Batch] | None:
        """The tenant's batches from this number on. None when the first of them is no longer kept, or the number is not
        one of this process."""
        if not self._start < sequence <= self.last(tenant) + 1:
            return None
        found = [batch for batch in self._batches if batch.tenant == tenant and batch.sequence >= sequence]
        return None if len(found) != self.last(tenant) + 1 - sequence else found

    def tenants(self) -> Iterator[str]:
        return iter(self._last)
