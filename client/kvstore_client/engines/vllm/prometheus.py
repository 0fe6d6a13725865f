"""Metrics of the connector at vLLM's own Prometheus endpoint.

The API server shows what the engine's processes counted. The names are those of a client's own metrics, with
`kvstore_vllm_` in place of `kvstore_client_`, and with vLLM's labels and the half of the connector in front.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics

from kvstore_client.engines.vllm.families import DURATIONS, HALF, Family, family_of
from kvstore_client.engines.vllm.stats import stats_of
from kvstore_client.metric import SECONDS


class ReusePromMetrics(KVConnectorPromMetrics):  # type: ignore[misc]  # vLLM has no types here
    """Shows what `ReuseStats` reports."""

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        stats, engine = stats_of(transfer_stats_data), self.per_engine_labelvalues[engine_idx]
        for half, counts in stats.counts().items():
            for name, count in counts.items():
                shown = family_of(name)
                if shown is not None and count > 0:
                    family, value = shown
                    values = () if value is None else (value,)
                    self._counter(family).labels(*engine, half, *values).inc(count)
        for half, told in stats.seconds().items():
            for name, durations in told.items():
                made = _histogram(self._histogram_cls, name, (*self._labelnames, HALF))
                histogram = made.labels(*engine, half)
                for seconds in durations:
                    histogram.observe(seconds)

    def _counter(self, family: Family) -> Any:
        labels = () if family.label is None else (family.label,)
        return _counter(self._counter_cls, family, (*self._labelnames, HALF, *labels))


@cache
def _counter(kind: Any, family: Family, labels: Sequence[str]) -> Any:
    """A second engine in one process shows its counts in the same counters."""
    return kind(
        name=f"kvstore_vllm_{family.name}", documentation=family.documentation, labelnames=list(labels)
    )


@cache
def _histogram(kind: Any, name: str, labels: Sequence[str]) -> Any:
    return kind(
        name=f"kvstore_vllm_{name}_seconds",
        documentation=DURATIONS[name],
        buckets=list(SECONDS),
        labelnames=list(labels),
    )
