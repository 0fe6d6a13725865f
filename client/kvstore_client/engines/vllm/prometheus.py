"""Metrics of the connector at vLLM's own Prometheus endpoint.

The API server shows what the engine's processes counted. The names are those of a client's own metrics, with
`kvstore_vllm_` in place of `kvstore_client_`, and with vLLM's labels and the half of the connector in front.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics

from kvstore_client.engines.vllm.stats import LOAD, PREDICTED_FETCH, stats_of

_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_DURATIONS = {
    LOAD: "How long a request waited for its KV, from the begin of its load to the end.",
    PREDICTED_FETCH: "How long a fetch was to take by its first plan.",
}
_HALF = "half"


@dataclass(frozen=True, slots=True)
class Family:
    """One counter with at most one label of its own."""

    name: str
    """Without `kvstore_vllm_` before it and `_total` behind it."""
    documentation: str
    label: str | None = None


_CHUNKS = Family("chunks", "Chunks that loads asked for, by how they ended.", "result")
_MATCHED = Family("matched_chunks", "Chunks that were found stored when a load began.", "kind")
_BYTES = Family("bytes", "Bytes of chunks moved, by direction.", "direction")
_PLANNED = Family("planned_chunks", "Matched chunks, by the last decision about them.", "decision")

_NAMED: Mapping[str, tuple[Family, str | None]] = {
    "chunks_delivered": (_CHUNKS, "delivered"),
    "chunks_missing": (_CHUNKS, "missing"),
    "chunks_matched_exact": (_MATCHED, "exact"),
    "chunks_matched_approximate": (_MATCHED, "approximate"),
    "tokens_matched": (Family("matched_tokens", "Tokens of the chunks that were found stored."), None),
    "tokens_reused": (Family("loaded_tokens", "Tokens whose KV was loaded instead of computed."), None),
    "bytes_in": (_BYTES, "in"),
    "bytes_out": (_BYTES, "out"),
    "chunks_stored": (Family("stored_chunks", "Chunks that were stored."), None),
    "chunks_under_replicated": (
        Family("under_replicated_chunks", "Chunks stored on fewer nodes than the number of replicas."),
        None,
    ),
    "chunks_planned_fetch": (_PLANNED, "fetch"),
    "chunks_planned_compute": (_PLANNED, "compute"),
    "replans": (Family("replans", "Times a fetch was replanned while it ran."), None),
}
_PREFIXED = {
    "miss_": Family("misses", "Reuse and storing that did not happen, by reason.", "reason"),
    "failover_": Family(
        "failovers", "Times a load continued with another node, by the first one's failure.", "reason"
    ),
    "guarded_": Family("guarded_frames", "Frames coded with a finer step, or exactly.", "action"),
}
NOT_SHOWN = ("fetches", "waiting_for_kv", "tokens_computed", "pages_", "frames_")
"""Names of counts, or their beginnings, that are not shown: the histogram counts loads, vLLM itself counts waiting
requests and computed tokens, and the connector handles no pages and reads no single frames."""


def family_of(name: str) -> tuple[Family, str | None] | None:
    """The counter that shows a count of `ClientMetrics.snapshot`, and the value of its label. None for `NOT_SHOWN`, and
    for a name that is unknown."""
    for prefix, family in _PREFIXED.items():
        if name.startswith(prefix):
            return family, name.removeprefix(prefix)
    return _NAMED.get(name)


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
                made = _histogram(self._histogram_cls, name, (*self._labelnames, _HALF))
                histogram = made.labels(*engine, half)
                for seconds in durations:
                    histogram.observe(seconds)

    def _counter(self, family: Family) -> Any:
        labels = () if family.label is None else (family.label,)
        return _counter(self._counter_cls, family, (*self._labelnames, _HALF, *labels))


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
        documentation=_DURATIONS[name],
        buckets=list(_BUCKETS_S),
        labelnames=list(labels),
    )
