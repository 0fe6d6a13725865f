"""docs/metrics.md, from the table: `python -m tests.service.observability.metrics_page > docs/metrics.md`."""

from kvstore_client.metric import Label, Metric
from kvstore_service.observability.table import METRICS

_HEAD = """\
# Metrics

What the parts of the service export for Prometheus. [observability.md](observability.md) says how to scrape them, and
has a dashboard and alerts over them. Labels have few values, so that each combination may be a time series: encodings
are named by their family (without the step and the tokens per frame), and tenants appear only with `--metrics-tenants`.

This page is made from `kvstore_service/observability/table.py`
(`python -m tests.service.observability.metrics_page > docs/metrics.md`). Tests compare it, and hold the table against
what a cluster and a client export.
"""
_SECTIONS = {
    "cluster": "## Cluster and storage nodes\n`kvstore serve --metrics-port PORT` exports them at `/metrics`.\n",
    "client": "## Clients\nA process that has a client exports them in the default registry of `prometheus_client`.\n",
    "vLLM": "## vLLM\nThe engine's API server exports what the connector in its processes counts.\n",
}


def _values(label: Label) -> str:
    if label.name == "encoding":
        return "`encoding`: a family of encodings, such as `exact-zstd`"
    if label.name == "reason" and len(label.values) > 10:
        return "`reason`: see [miss-reasons.md](miss-reasons.md)"
    shown = ", ".join(f"`{value}`" for value in label.values) or label.meaning
    return f"`{label.name}`: {shown}"


def _row(metric: Metric) -> str:
    labels = "; ".join(map(_values, metric.labels))
    return f"| `{metric.name}` | {metric.kind} | {metric.unit} | {labels} | {metric.meaning} |\n"


def metrics_page() -> str:
    """The whole of docs/metrics.md."""
    page = _HEAD
    for exporter, metrics in METRICS.items():
        page += f"\n{_SECTIONS[exporter]}\n| metric | type | unit | labels | meaning |\n"
        page += "| --- | --- | --- | --- | --- |\n"
        page += "".join(map(_row, metrics))
    return page


if __name__ == "__main__":
    print(metrics_page(), end="")
