"""The table of all metrics, from which docs/metrics.md is made."""

from collections.abc import Mapping, Sequence

from kvstore_client.engines.vllm.families import vllm_metrics
from kvstore_client.metric import Metric
from kvstore_client.metric_table import CLIENT_METRICS
from kvstore_service.observability.node_metrics import node_metrics

METRICS: Mapping[str, Sequence[Metric]] = {
    "cluster": tuple(node_metrics()),
    "client": CLIENT_METRICS,
    "vLLM": tuple(vllm_metrics()),
}
"""Metrics by who exports them: `kvstore serve --metrics-port`, a process with a client, and vLLM's API server."""
