"""Rates to which a storage node can limit the reads from its disk, for experiments."""

from kvstore_codec.errors import ConfigurationError

SLOWEST_BPS = 1e6
"""Bytes per second. At a lower rate the read of one chunk exceeds the timeouts of readers."""
FASTEST_BPS = 1e12
"""Bytes per second. Faster than any disk, and small enough for the 64-bit integers of node statistics."""


def require_disk_rate(bytes_per_s: float | None) -> None:
    """Raises ConfigurationError if reads cannot be limited to this rate. None is no limit."""
    if bytes_per_s is not None and not SLOWEST_BPS <= bytes_per_s <= FASTEST_BPS:
        raise ConfigurationError(
            f"a disk can be limited to {SLOWEST_BPS / 1e6:.0f} MB/s or more, up to {FASTEST_BPS / 1e12:.0f} TB/s, "
            f"not to {bytes_per_s:g} bytes/s"
        )
