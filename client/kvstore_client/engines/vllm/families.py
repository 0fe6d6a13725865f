"""The metrics at vLLM's own Prometheus endpoint, by what a client counts. Needs no vLLM."""

from collections.abc import Mapping
from dataclasses import dataclass

from kvstore_client import metric_table as table
from kvstore_client.metric import Kind, Label, Metric

DURATIONS = {
    "load": "How long a request waited for its KV, from the begin of its load to the end.",
    "predicted_fetch": "How long a fetch was to take by its first plan.",
}
HALF = "half"


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
    "chunks_cancelled": (_CHUNKS, "cancelled"),
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
    "fetched_": Family("fetched_bytes", "Bytes of chunks that loads delivered, by encoding.", "encoding"),
    "stored_": Family(
        "stored_bytes", "Bytes of chunks that nodes accepted, all copies, by encoding.", "encoding"
    ),
    "guarded_": Family("guarded_frames", "Frames coded with a finer step, or exactly.", "action"),
}
NOT_SHOWN = ("fetches", "waiting_for_kv", "tokens_computed", "tokens_requested", "pages_", "frames_")
"""Names of counts, or their beginnings, that are not shown: the histogram counts loads, vLLM itself counts waiting
requests, computed and requested tokens, and the connector handles no pages and reads no single frames."""


def family_of(name: str) -> tuple[Family, str | None] | None:
    """The counter that shows a count of `ClientMetrics.snapshot`, and the value of its label. None for `NOT_SHOWN`, and
    for a name that is unknown."""
    for prefix, family in _PREFIXED.items():
        if name.startswith(prefix):
            return family, name.removeprefix(prefix)
    return _NAMED.get(name)


def vllm_metrics() -> list[Metric]:
    """The rows of these metrics in the table. Each also has vLLM's labels."""
    own = (
        Label("model_name", meaning="as vLLM serves it"),
        Label("engine", meaning="number of the engine"),
        Label(HALF, ("scheduler", "worker")),
    )
    labels = {(metric.name, label.name): label for metric in table.CLIENT_METRICS for label in metric.labels}
    families = dict.fromkeys([*(family for family, _ in _NAMED.values()), *_PREFIXED.values()])
    return [
        Metric(
            f"kvstore_vllm_{family.name}_total",
            Kind.COUNTER,
            next((unit for unit in ("tokens", "bytes", "frames", "chunks") if unit in family.name), "events"),
            family.documentation,
            # The label of the client's metric of the same name.
            (
                *own,
                *([labels[f"kvstore_client_{family.name}_total", family.label]] if family.label else []),
            ),
        )
        for family in families
    ] + [
        Metric(f"kvstore_vllm_{name}_seconds", Kind.HISTOGRAM, "seconds", text, own)
        for name, text in DURATIONS.items()
    ]
