"""A limit on the bandwidth at which a storage node sends to readers, for experiments with slow links."""

from collections.abc import Iterator, Sequence

from kvstore_cluster.pacer import Limit
from kvstore_codec.errors import ConfigurationError
from kvstore_service.bandwidth import piece_bytes

SLOWEST_BPS = 100e3
"""Lowest limit. Below it one piece takes longer than the timeout of readers."""
FASTEST_BPS = 1e12
"""Highest limit, faster than any link. Gauges of a node are 64-bit integers."""
_BURST_BYTES = 16 << 10


def require_bandwidth(bandwidth_bps: float | None) -> None:
    """Raises ConfigurationError if a node cannot be limited to this bandwidth."""
    if bandwidth_bps is not None and not SLOWEST_BPS <= bandwidth_bps <= FASTEST_BPS:
        raise ConfigurationError(
            f"a node can be limited to {SLOWEST_BPS / 1e3:.0f} kbit/s or more, up to {FASTEST_BPS / 1e9:.0f} "
            f"Gbit/s, not to {bandwidth_bps:g} bit/s"
        )


class Throttle:
    """The bandwidth limit of one node. All its connections share it in turns. It is off at first, and then costs one
    read of a field. Thread-safe."""

    def __init__(self) -> None:
        self._limit: Limit | None = None

    @property
    def bandwidth_bps(self) -> float | None:
        """The current limit, bits per second. None means no limit."""
        limit = self._limit
        return None if limit is None else 8 * limit.bytes_per_s

    def set(self, bandwidth_bps: float | None) -> None:
        """Sets the limit; None removes it. Threads that wait under the previous limit continue at once. Raises
        ConfigurationError."""
        require_bandwidth(bandwidth_bps)
        # If two threads set limits at once, one limit is not lifted; its waiters then wait for one piece at most.
        before, self._limit = (
            self._limit,
            (None if bandwidth_bps is None else Limit(bandwidth_bps / 8, _BURST_BYTES)),
        )
        if before is not None:
            before.lift()

    def paced(self, views: Sequence[memoryview]) -> Iterator[list[memoryview]]:
        """Yields the bytes of `views` when they may be sent. Without a limit it yields all at once, otherwise pieces of
        2 ms, so that all connections get their turn and a changed limit takes effect. Blocks between pieces."""
        if self._limit is None:
            yield list(views)
            return
        for view in views:
            rest = view
            while rest.nbytes:
                limit = self._limit
                size = rest.nbytes if limit is None else min(rest.nbytes, piece_bytes(limit.bytes_per_s))
                if limit is not None:
                    limit.wait_until(limit.reserve(size))
                yield [rest[:size]]
                rest = rest[size:]
