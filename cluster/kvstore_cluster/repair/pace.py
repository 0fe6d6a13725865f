"""Limits the rate at which repair sends copies."""

from collections.abc import Iterator, Sequence

from kvstore_cluster.pacer import Pacer
from kvstore_cluster.stored import StoredVariant

# Size of a burst: large enough to send several small copies in one call, small enough not to delay client traffic.
_BURST_BYTES = 4 << 20
_BURST_S = 0.05


class Pace:
    """Limits copies to `bytes_per_s` on average, with bursts. The caller passes the time, in seconds of one clock."""

    def __init__(self, bytes_per_s: float) -> None:
        self._pacer = Pacer(bytes_per_s)
        self._burst_bytes = min(_BURST_BYTES, bytes_per_s * _BURST_S)

    def bursts(self, variants: Sequence[StoredVariant]) -> Iterator[list[StoredVariant]]:
        """Splits the variants into bursts of at least one copy."""
        burst: list[StoredVariant] = []
        size_bytes = 0
        for variant in variants:
            if burst and size_bytes + variant.size_bytes > self._burst_bytes:
                yield burst
                burst, size_bytes = [], 0
            burst.append(variant)
            size_bytes += variant.size_bytes
        if burst:
            yield burst

    def wait_s(self, now_s: float) -> float:
        """Seconds until the next burst may be sent."""
        return max(0.0, self._pacer.free_at_s - now_s)

    def sent(self, size_bytes: int, now_s: float) -> None:
        self._pacer.reserve(size_bytes, now_s)
