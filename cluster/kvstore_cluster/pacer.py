"""How fast bytes may pass: the one schedule that repair, experiments and the links of benchmarks keep to."""

import threading
import time

from kvstore_codec.errors import ConfigurationError


class Pacer:
    """Who may send which bytes when, so that they are `bytes_per_s` on average and at most `burst_bytes` ahead of that.
    Shared by all who send. Thread-safe; clocks are the caller's, in seconds.

    Kept as the time at which the way is next free rather than as a count of tokens (the virtual scheduling form of the
    token bucket, ITU-T I.371), so nothing has to run while nothing is sent.
    """

    def __init__(self, bytes_per_s: float, burst_bytes: float = 0) -> None:
        self._lock = threading.Lock()
        self._burst_bytes = burst_bytes
        self.free_at_s = 0.0
        self.reserved_bytes = 0
        self.set_rate(bytes_per_s)

    def set_rate(self, bytes_per_s: float) -> None:
        """For what is reserved from now on. Raises ConfigurationError."""
        if not 0 < bytes_per_s < float("inf"):
            raise ConfigurationError(f"a bandwidth is above 0 bytes a second, not {bytes_per_s}")
        with self._lock:
            self.bytes_per_s = bytes_per_s

    def reserve(self, size_bytes: int, ready_at_s: float) -> float:
        """When the last of these bytes, which are ready to go at `ready_at_s`, has left."""
        with self._lock:
            start_s = max(self.free_at_s, ready_at_s - self._burst_bytes / self.bytes_per_s)
            self.free_at_s = start_s + size_bytes / self.bytes_per_s
            self.reserved_bytes += size_bytes
            return max(self.free_at_s, ready_at_s)


class Limit:
    """A rate that threads wait under until `lift`."""

    def __init__(self, bytes_per_s: float, burst_bytes: float = 0) -> None:
        self._pacer = Pacer(bytes_per_s, burst_bytes)
        self._lifted = threading.Event()

    @property
    def bytes_per_s(self) -> float:
        return self._pacer.bytes_per_s

    def reserve(self, size_bytes: int) -> float:
        """The monotonic time at which so many bytes have passed."""
        return self._pacer.reserve(size_bytes, time.monotonic())

    def wait_until(self, at_s: float) -> None:
        """Returns at that monotonic time, or when the limit is lifted."""
        self._lifted.wait(max(0.0, at_s - time.monotonic()))

    def lift(self) -> None:
        """Whoever waits goes on."""
        self._lifted.set()
