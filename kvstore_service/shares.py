"""Limits of calls in progress: of all callers together, and of each tenant."""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from kvstore_codec.errors import BusyError


class Shares:
    """Counts the calls in progress of each tenant. `kind` names such calls in errors. Thread-safe."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._lock = threading.Lock()
        self._taken: Counter[str] = Counter()  # by tenant
        self._total = 0

    @contextmanager
    def taken(self, tenant: str, *, most: int, most_of_tenant: int) -> Iterator[None]:
        """Counts one call of the tenant while the block runs. Raises BusyError if there would be more than `most`, or
        more than `most_of_tenant` of the tenant."""
        with self._lock:
            of_tenant = self._taken[tenant]
            free = self._total < most and of_tenant < most_of_tenant
            if free:
                self._taken[tenant] += 1
                self._total += 1
        if not free:
            raise BusyError(
                f"{of_tenant} {self._kind} of this tenant are already in progress, {self._total} of all callers; "
                f"at most {most_of_tenant} and {most} are served at a time, try again"
            )
        try:
            yield
        finally:
            with self._lock:
                self._total -= 1
                self._taken[tenant] -= 1
                if not self._taken[tenant]:
                    del self._taken[tenant]
