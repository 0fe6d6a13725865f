"""Counts of both halves of the connector on their way to vLLM's log line and its Prometheus endpoint.

vLLM asks each half after every step, adds the answers up, and sends the sum to the process of the API server. What is
counted behind the engine's back after the last step is reported with the next one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorStats

from kvstore_client.metrics import ClientMetrics

SCHEDULER, WORKER = "scheduler", "worker"
"""The two halves of the connector."""

LOAD, PREDICTED_FETCH = "load", "predicted_fetch"
"""What durations are reported of: loads, and fetches by their first plan."""

_COUNTS, _SECONDS = "counts", "seconds"
_MIB = 1 << 20


@dataclass
class ReuseStats(KVConnectorStats):  # type: ignore[misc]  # vLLM has no types here
    """What the halves counted in an interval. `data` holds, by half, the growth of its client's counts by the names of
    `ClientMetrics.snapshot`, and durations in seconds, by what they are of. It consists of plain values, because it
    travels between processes as MessagePack."""

    data: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, half: str, counts: dict[str, int], seconds: Mapping[str, Sequence[float]]) -> ReuseStats:
        return cls({half: {_COUNTS: counts, _SECONDS: {name: list(told) for name, told in seconds.items()}}})

    def counts(self) -> dict[str, dict[str, int]]:
        """Growth of the counts, by half and name."""
        return {half: told[_COUNTS] for half, told in self.data.items()}

    def seconds(self) -> dict[str, dict[str, list[float]]]:
        """Durations, by half and by what they are of."""
        return {half: told[_SECONDS] for half, told in self.data.items()}

    def reset(self) -> None:
        self.data = {}

    def is_empty(self) -> bool:
        return not any(told[_COUNTS] or any(told[_SECONDS].values()) for told in self.data.values())

    def aggregate(self, other: KVConnectorStats) -> ReuseStats:
        """Add `other` to this and return this."""
        for half, told in other.data.items():
            mine = self.data.setdefault(half, {_COUNTS: {}, _SECONDS: {}})
            for name, count in told[_COUNTS].items():
                mine[_COUNTS][name] = mine[_COUNTS].get(name, 0) + count
            for name, durations in told[_SECONDS].items():
                mine[_SECONDS].setdefault(name, []).extend(durations)
        return self

    def reduce(self) -> dict[str, int | float]:
        """A few numbers for vLLM's log line: what was loaded and stored, and each reason for a miss."""
        counts: Counter[str] = Counter()
        load_s: list[float] = []
        for told in self.data.values():
            counts.update(told[_COUNTS])
            load_s.extend(told[_SECONDS].get(LOAD, ()))
        moved = {
            "loads": len(load_s),
            "mean load (ms)": round(1000 * sum(load_s) / len(load_s), 1) if load_s else 0.0,
            "loaded tokens": counts["tokens_reused"],
            "loaded MiB": round(counts["bytes_in"] / _MIB, 1),
            "stored chunks": counts["chunks_stored"],
            "stored MiB": round(counts["bytes_out"] / _MIB, 1),
        }
        misses = {name: count for name, count in sorted(counts.items()) if name.startswith("miss_")}
        return moved | misses


class StatsSource:
    """What one half has counted since vLLM last asked. Used by the half's thread."""

    def __init__(self, half: str, metrics: ClientMetrics) -> None:
        self._half, self._metrics = half, metrics
        self._told: dict[str, int] = {}
        self._told_changes = 0
        """Value of `ClientMetrics.changes` that `_told` belongs to."""

    def take(self, load_s: Sequence[float] = ()) -> ReuseStats | None:
        """The growth of the counts since the last call, and how long loads took that have ended since; None where there
        is neither, as after most steps."""
        changes = self._metrics.changes
        if changes == self._told_changes and not load_s:
            return None
        self._told_changes = changes
        counts = self._metrics.snapshot()
        grown = {name: more for name, count in counts.items() if (more := count - self._told.get(name, 0))}
        self._told = counts
        durations = {LOAD: load_s, PREDICTED_FETCH: self._metrics.take_predictions()}
        seconds = {name: told for name, told in durations.items() if told}
        return ReuseStats.of(self._half, grown, seconds) if grown or seconds else None


def stats_of(data: dict[str, Any] | None) -> ReuseStats:
    """The stats that travelled as `data`."""
    return ReuseStats(data if data is not None else {})
