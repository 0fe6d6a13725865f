"""A disk as slow as another one, for experiments: reads take at least as long as they would there."""

import threading
import time

from kvstore_codec.errors import ConfigurationError

SLOWEST_BPS = 1e6
"""Bytes per second. Below it one chunk takes longer than readers have patience."""
FASTEST_BPS = 1e12
"""Beyond all disks; what a node says of itself are integers of 64 bits."""


class ReadSpeed:
    """Of all readers of a disk together, in the order in which they come: it does one thing at a time. Off at first.
    Only its rate is that of the other disk, not how long it takes to find a place. Thread-safe."""

    def __init__(self) -> None:
        self._limit: _Limit | None = None

    @property
    def limit_bytes_per_s(self) -> float | None:
        limit = self._limit
        return None if limit is None else limit.bytes_per_s

    def set(self, bytes_per_s: float | None) -> None:
        """From now on; whoever waits under another limit goes on at once. Raises ConfigurationError."""
        if bytes_per_s is not None and not SLOWEST_BPS <= bytes_per_s <= FASTEST_BPS:
            raise ConfigurationError(
                f"a disk can be limited to {SLOWEST_BPS / 1e6:.0f} MB/s or more, up to {FASTEST_BPS / 1e12:.0f} TB/s, "
                f"not to {bytes_per_s:g} bytes/s"
            )
        before, self._limit = self._limit, None if bytes_per_s is None else _Limit(bytes_per_s)
        if before is not None:
            before.over.set()

    def begin(self, size_bytes: int) -> "Reading | None":
        """A read of so many bytes begins. None without a limit."""
        limit = self._limit
        return None if limit is None else Reading(limit.over, limit.reserve(size_bytes))


class Reading:
    """A read that may end at `ready_at_s` of the monotonic clock."""

    def __init__(self, over: threading.Event, ready_at_s: float) -> None:
        self._over = over
        self._ready_at_s = ready_at_s

    def finish(self) -> None:
        """Returns once the other disk would have read it."""
        self._over.wait(max(0.0, self._ready_at_s - time.monotonic()))


class _Limit:
    """Kept as the time at which the disk is next free, so that nothing runs while nothing is read."""

    def __init__(self, bytes_per_s: float) -> None:
        self.bytes_per_s = bytes_per_s
        self.over = threading.Event()
        self._lock = threading.Lock()
        self._free_at_s = 0.0

    def reserve(self, size_bytes: int) -> float:
        with self._lock:
            self._free_at_s = max(self._free_at_s, time.monotonic()) + size_bytes / self.bytes_per_s
            return self._free_at_s
