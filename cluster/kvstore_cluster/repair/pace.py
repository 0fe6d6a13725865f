"""How fast copies may be sent."""

from collections.abc import Iterator, Sequence

from kvstore_cluster.pacer import Pacer
from kvstore_cluster.stored import StoredVariant

# Sent at a stretch: enough that small copies do not each cost a call, little enough not to be noticed.
_BURST_BYTES = 4 << 20
_BURST_S = 0.05


class Pace:
    """On average `bytes_per_s`, and never more than one burst ahead of that. Clocks are the caller's,
    in seconds."""

    def __init__(self, bytes_per_s: float) -> None:
        self._pacer = Pacer(bytes_per_s)
        self._burst_bytes = min(_BURST_BYTES, bytes_per_s * _BURST_S)

    def bursts(self, variants: Sequence[StoredVariant]) -> Iterator[list[StoredVariant]]:
        """The variants in parts to send at a stretch, of one copy at least."""
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
        """How long the next burst has to wait."""
        return max(0.0, self._pacer.free_at_s - now_s)

    def sent(self, size_bytes: int, now_s: float) -> None:
        self._pacer.reserve(size_bytes, now_s)
