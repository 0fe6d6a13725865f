"""Rate limits in bytes per second, for repair, slow disks in experiments and simulated links in benchmarks."""

import threading
import time

from kvstore_codec.errors import ConfigurationError


class Pacer:
    """Schedules transfers at an average rate of `bytes_per_s`, with bursts of up to `burst_bytes`. All senders under
    one limit share a pacer. Thread-safe. Callers pass times in seconds on a clock of their choice.

    The state is the time at which the link is next free, not a count of tokens (the virtual scheduling form of the
    token bucket, ITU-T I.371). So an idle pacer needs no work.
    """

    def __init__(self, bytes_per_s: float, burst_bytes: float = 0) -> None:
        self._lock = threading.Lock()
        self._burst_bytes = burst_bytes
        self.free_at_s = 0.0
        self.reserved_bytes = 0
        self.set_rate(bytes_per_s)

    def set_rate(self, bytes_per_s: float) -> None:
        """Changes the rate of later reservations. Raises ConfigurationError."""
        if not 0 < bytes_per_s < float("inf"):
            raise ConfigurationError(f"a bandwidth must be finite and above 0 bytes/s, not {bytes_per_s}")
        with self._lock:
            self.bytes_per_s = bytes_per_s

    def reserve(self, size_bytes: int, ready_at_s: float) -> float:
        """Reserves a transfer of bytes that are ready at `ready_at_s`. Returns the time at which it ends."""
        with self._lock:
            start_s = max(self.free_at_s, ready_at_s - self._burst_bytes / self.bytes_per_s)
            self.free_at_s = start_s + size_bytes / self.bytes_per_s
            self.reserved_bytes += size_bytes
            return max(self.free_at_s, ready_at_s)


class Limit:
    """A rate limit on a monotonic clock. Threads wait for their transfers, until `lift` ends the limit."""

    def __init__(self, bytes_per_s: float, burst_bytes: float = 0) -> None:
        self._pacer = Pacer(bytes_per_s, burst_bytes)
        self._lifted = threading.Event()

    @property
    def bytes_per_s(self) -> float:
        return self._pacer.bytes_per_s

    def reserve(self, size_bytes: int) -> float:
        """Reserves a transfer of bytes that are ready now. Returns the monotonic time at which it ends."""
        return self._pacer.reserve(size_bytes, time.monotonic())

    def wait_until(self, at_s: float) -> None:
        """Waits until a monotonic time, or until the limit is lifted."""
        self._lifted.wait(max(0.0, at_s - time.monotonic()))

    def lift(self) -> None:
        """Ends the limit and wakes all waiting threads."""
        self._lifted.set()
