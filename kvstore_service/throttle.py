"""A limit on what a storage node sends to readers, for experiments with slow links."""

from collections.abc import Iterator, Sequence

from kvstore_cluster.pacer import Limit
from kvstore_codec.errors import ConfigurationError
from kvstore_service.bandwidth import piece_bytes

SLOWEST_BPS = 100e3
"""Below it one piece takes longer than readers have patience."""
FASTEST_BPS = 1e12
"""Beyond all links; what a node says of itself are integers of 64 bits."""
_BURST_BYTES = 16 << 10


class Throttle:
    """One for all connections of a node; they share the bandwidth in turns. Off at first, and then it costs the
    reading of a field. Thread-safe."""

    def __init__(self) -> None:
        self._limit: Limit | None = None

    @property
    def bandwidth_bps(self) -> float | None:
        """None: no limit."""
        limit = self._limit
        return None if limit is None else 8 * limit.bytes_per_s

    def set(self, bandwidth_bps: float | None) -> None:
        """From now on; whoever waits for a piece under another limit goes on at once. Raises ConfigurationError."""
        if bandwidth_bps is not None and not SLOWEST_BPS <= bandwidth_bps <= FASTEST_BPS:
            raise ConfigurationError(
                f"a node can be limited to {SLOWEST_BPS / 1e3:.0f} kbit/s or more, up to {FASTEST_BPS / 1e9:.0f} "
                f"Gbit/s, not to {bandwidth_bps:g} bit/s"
            )
        # Two at once: the one that is not seen any more has nobody waiting for long.
        before, self._limit = (
            self._limit,
            (None if bandwidth_bps is None else Limit(bandwidth_bps / 8, _BURST_BYTES)),
        )
        if before is not None:
            before.lift()

    def paced(self, views: Sequence[memoryview]) -> Iterator[list[memoryview]]:
        """These bytes, each piece of them when it may leave: all at once without a limit, else pieces of 2 ms, so that
        all connections have their turn and a limit that changes in between is kept."""
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
