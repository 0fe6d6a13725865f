"""Simulates a slow disk for experiments: reads take at least as long as on that disk, and chunks on it are not kept in
memory."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from kvstore_cluster.arena import Arena
from kvstore_cluster.disk import Location, SegmentStore
from kvstore_cluster.disk_rate import require_disk_rate
from kvstore_cluster.node import StorageNode
from kvstore_cluster.pacer import Limit
from kvstore_cluster.residency import Residency
from kvstore_cluster.stats import NodeStats
from kvstore_codec.errors import ConfigurationError


class ReadSpeed:
    """A rate limit that all readers of a disk share. Serves one read at a time, in order of arrival. Simulates the
    bandwidth of a disk, not its seek time. Without a limit until `set` is called. Thread-safe."""

    def __init__(self) -> None:
        self.limit: Limit | None = None

    @property
    def limit_bytes_per_s(self) -> float | None:
        limit = self.limit
        return None if limit is None else limit.bytes_per_s

    def set(self, bytes_per_s: float | None) -> None:
        """Changes the limit; None removes it. Reads that wait under the old limit end at once. Raises
        ConfigurationError."""
        require_disk_rate(bytes_per_s)
        before, self.limit = self.limit, None if bytes_per_s is None else Limit(bytes_per_s)
        if before is not None:
            before.lift()


class SlowStore(SegmentStore):
    """A segment store whose reads are limited to `read_speed`."""

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
    """A storage node whose disk reads can be limited. Takes the options of `StorageNode`."""

    def __init__(self, node_id: str, arena: Arena, *, store: SlowStore | None = None, **options: Any) -> None:
        self._read_speed = None if store is None else store.read_speed
        residency = Residency() if store is None else _OnlyOnDisk(store.read_speed)
        super().__init__(node_id, arena, store=store, residency=residency, **options)

    def limit_disk(self, read_bytes_per_s: float | None) -> None:
        """Limits the rate of disk reads; None removes the limit. Under a limit chunks that are on disk leave memory, at
        once or within a second of their put, and no chunk is promoted. Raises ConfigurationError."""
        if self._read_speed is not None:
            self._read_speed.set(read_bytes_per_s)
            self._migration.demote()
        elif read_bytes_per_s is not None:
            raise ConfigurationError(f"{self.node_id} has no disk to limit; start it with --disk")

    def stats(self) -> NodeStats:
        stats = super().stats()
        limit = None if self._read_speed is None else self._read_speed.limit_bytes_per_s
        return (
            stats
            if limit is None
            else replace(stats, gauges=stats.gauges | {"disk_throttle_Bps": int(limit)})
        )


class _OnlyOnDisk(Residency):
    """Keeps no chunk that is on disk in memory while the disk is limited."""

    def __init__(self, read_speed: ReadSpeed) -> None:
        self._read_speed = read_speed

    def promotes(self, length: int, size_bytes: int) -> bool:
        return self._read_speed.limit is None and super().promotes(length, size_bytes)

    def watermarks(self) -> tuple[float, float]:
        return super().watermarks() if self._read_speed.limit is None else (0.0, 0.0)
