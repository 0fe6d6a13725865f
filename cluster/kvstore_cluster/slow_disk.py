"""A disk as slow as another one, for experiments: reads take at least as long as they would there, and what is on it is
only there."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from kvstore_cluster.arena import Arena
from kvstore_cluster.disk import Location, SegmentStore
from kvstore_cluster.node import StorageNode
from kvstore_cluster.pacer import Limit
from kvstore_cluster.residency import Residency
from kvstore_cluster.stats import NodeStats
from kvstore_codec.errors import ConfigurationError

SLOWEST_BPS = 1e6
"""Bytes per second. Below it one chunk takes longer than readers have patience."""
FASTEST_BPS = 1e12
"""Beyond all disks; what a node says of itself are integers of 64 bits."""


class ReadSpeed:
    """Of all readers of a disk together, in the order in which they come: it does one thing at a time. Off at first.
    Only its rate is that of the other disk, not how long it takes to find a place. Thread-safe."""

    def __init__(self) -> None:
        self.limit: Limit | None = None

    @property
    def limit_bytes_per_s(self) -> float | None:
        limit = self.limit
        return None if limit is None else limit.bytes_per_s

    def set(self, bytes_per_s: float | None) -> None:
        """From now on; whoever waits under another limit goes on at once. Raises ConfigurationError."""
        if bytes_per_s is not None and not SLOWEST_BPS <= bytes_per_s <= FASTEST_BPS:
            raise ConfigurationError(
                f"a disk can be limited to {SLOWEST_BPS / 1e6:.0f} MB/s or more, up to {FASTEST_BPS / 1e12:.0f} TB/s, "
                f"not to {bytes_per_s:g} bytes/s"
            )
        before, self.limit = self.limit, None if bytes_per_s is None else Limit(bytes_per_s)
        if before is not None:
            before.lift()


class SlowStore(SegmentStore):
    """A segment store whose reads take as long as `read_speed` says."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.read_speed = ReadSpeed()

    def read(self, location: Location, offset: int, views: Sequence[memoryview]) -> None:
        limit = self.read_speed.limit
        if limit is None:
            super().read(location, offset, views)
            return
        ready_at_s = limit.reserve(sum(view.nbytes for view in views))
        super().read(location, offset, views)
        limit.wait_until(ready_at_s)


class SlowNode(StorageNode):
    """A storage node whose disk, if it has one, can be made slow; it takes the options of `StorageNode`."""

    def __init__(self, node_id: str, arena: Arena, *, store: SlowStore | None = None, **options: Any) -> None:
        self._read_speed = None if store is None else store.read_speed
        residency = Residency() if store is None else _OnlyOnDisk(store.read_speed)
        super().__init__(node_id, arena, store=store, residency=residency, **options)

    def limit_disk(self, read_bytes_per_s: float | None) -> None:
        """Makes reads from the disk as slow as on another one; None: as fast as they are. Under a limit memory that has
        chunks of the disk is given back, at once or within a second of a put, and nothing is promoted. Raises
        ConfigurationError."""
        if self._read_speed is not None:
            self._read_speed.set(read_bytes_per_s)
            self._migration.demote()
        elif read_bytes_per_s is not None:
            raise ConfigurationError(f"{self.node_id} has no disk that could be slow; start it with --disk")

    def stats(self) -> NodeStats:
        stats = super().stats()
        limit = None if self._read_speed is None else self._read_speed.limit_bytes_per_s
        return (
            stats
            if limit is None
            else replace(stats, gauges=stats.gauges | {"disk_throttle_Bps": int(limit)})
        )


class _OnlyOnDisk(Residency):
    """While the disk is slow, nothing of it is in memory."""

    def __init__(self, read_speed: ReadSpeed) -> None:
        self._read_speed = read_speed

    def promotes(self, length: int, size_bytes: int) -> bool:
        return self._read_speed.limit is None and super().promotes(length, size_bytes)

    def watermarks(self) -> tuple[float, float]:
        return super().watermarks() if self._read_speed.limit is None else (0.0, 0.0)
