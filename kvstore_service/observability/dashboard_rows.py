"""The charts of the Grafana dashboard.

Queries about clients also read what vLLM's API server exports of them. Counters appear there under the names of a
client, with `kvstore_vllm_` in place of `kvstore_client_`.
"""

from kvstore_service.observability.panels import Panel, Query, Row

_NODE = 'node_id=~"$node"'
_RATE = "[$__rate_interval]"


def _client(name: str, labels: str = "") -> str:
    """Selects a metric of a client, wherever it is exported."""
    return f'{{__name__=~"kvstore_(client|vllm)_{name}"{labels and "," + labels}}}'


def _sum(selector: str, by: str = "") -> str:
    return f"sum {f'by ({by}) ' if by else ''}(rate({selector}{_RATE}))"


def _node(name: str, labels: str = "") -> str:
    return f"kvstore_node_{name}{{{_NODE}{labels and ',' + labels}}}"


def _ratio(part: str, whole: str) -> str:
    """The share, and 0 while there is nothing to share."""
    return f"{part} / clamp_min({whole}, 1e-9)"


def _quantiles(buckets: str, *shares: float) -> list[Query]:
    return [Query(f"histogram_quantile({share}, {_sum(buckets, 'le')})", f"{share:.0%}") for share in shares]


_ASKED = " + ".join(_sum(_node(f"{name}_total")) for name in ("hits", "misses", "unusable"))
_ASKED_CHUNKS = f"({_ASKED})"
_BAD = (("red", None), ("green", 1.0))


ROWS = (
    Row(
        "Overview",
        (
            Panel(
                "Coordinator", "bool_on_off", [Query("min(kvstore_coordinator_up)", "up")], kind="stat", width=4,
                thresholds=_BAD,
            ),
            Panel(
                "Nodes that answer", "percentunit", [Query("avg(kvstore_node_up)", "up")], kind="stat", width=4,
                thresholds=_BAD,
            ),
            Panel(
                "Hit rate", "percentunit",
                [Query(_ratio(_sum(_node("hits_total")), _ASKED_CHUNKS), "chunks")],
                "Chunks that lookups found and could use, of all that they asked for.", kind="stat", width=4,
            ),
            Panel(
                "Stored", "bytes", [Query("sum(kvstore_node_stored_bytes)", "bytes")], kind="stat", width=4
            ),
            Panel("Sent to readers", "Bps", [Query(_sum(_node("bytes_out_total")), "out")], kind="stat", width=4),
            Panel(
                "Missing replicas", "short", [Query("sum(kvstore_node_repair_left)", "variants")], kind="stat", width=4,
                thresholds=(("green", None), ("orange", 1.0)),
            ),
        ),
    ),
    Row(
        "Reuse",
        (
            Panel(
                "Tokens requested and found", "short",
                [
                    Query(_sum("kvstore_client_requested_tokens_total"), "requested"),
                    Query(_sum(_client("matched_tokens_total")), "found"),
                    Query(_sum('kvstore_client_tokens_total{source="reused"}'), "reused"),
                ],
                "Tokens a second. vLLM itself counts requested tokens (vllm:external_prefix_cache_queries).",
            ),
            Panel(
                "Hits and misses of nodes", "short",
                [Query(_sum(_node(f"{name}_total")), name) for name in ("hits", "misses", "unusable")],
                "Chunks a second. Unusable chunks stand behind a missing one.", stacked=True,
            ),
            Panel(
                "Why KV was not reused or not stored", "short",
                [Query(_sum(_client("misses_total"), "reason"), "{{reason}}")],
                "Events a second, by reason (docs/miss-reasons.md).",
            ),
            Panel(
                "Matched chunks", "short",
                [Query(_sum(_client("matched_chunks_total"), "kind"), "{{kind}}")],
                "Chunks a second, in their own context (exact) or in another one (approximate).", stacked=True,
            ),
            Panel(
                "Chunks fetched or computed", "short",
                [Query(_sum(_client("planned_chunks_total"), "decision"), "{{decision}}")],
                "Matched chunks a second, by the last decision of the planner.", stacked=True,
            ),
            Panel(
                "Chunks of fetches", "short",
                [
                    Query(_sum(_client("chunks_total"), "result"), "{{result}}"),
                    Query(_sum(_client("failovers_total")) + " or vector(0)", "failovers"),
                ],
                "Chunks a second, and fetches that went on with another node.",
            ),
        ),
    ),
    Row(
        "Fetches",
        (
            Panel(
                "Time of a fetch", "s",
                _quantiles(_client("(fetch|load)_seconds_bucket"), 0.5, 0.9, 0.99),
                "Of vLLM: how long requests waited for their KV.",
            ),
            Panel(
                "Stages of a fetch", "s",
                [
                    Query(
                        f"{_sum('kvstore_client_stage_seconds_sum', 'stage')} / scalar("
                        f"clamp_min({_sum('kvstore_client_fetch_seconds_count')}, 1e-9))",
                        "{{stage}}",
                    )
                ],
                "Mean time in which a stage worked, for each fetch. Stages overlap.", stacked=True,
            ),
            Panel(
                "Predicted and real time", "s",
                [
                    Query(_ratio(_sum(f"{name}_seconds_sum"), _sum(f"{name}_seconds_count")), legend)
                    for name, legend in (("kvstore_predicted_fetch", "predicted"), ("kvstore_client_fetch", "real"))
                ],
                "Means. Only planned fetches have a prediction.",
            ),
            Panel(
                "Real time divided by predicted time", "short",
                _quantiles("kvstore_client_fetch_prediction_ratio_bucket", 0.1, 0.5, 0.9),
                "1 is a perfect prediction; above 1 the fetch was slower.",
            ),
            Panel(
                "Fetched bytes by encoding", "Bps",
                [Query(_sum(_client("fetched_bytes_total"), "encoding"), "{{encoding}}")], stacked=True,
            ),
            Panel(
                "Estimated bandwidth of nodes", "Bps",
                [
                    Query("max by (endpoint) (kvstore_client_bandwidth_bytes_per_second)", "{{endpoint}}"),
                ],
                "As clients estimate it. Exported by clients outside of vLLM.",
            ),
        ),
    ),
    Row(
        "Storage",
        (
            Panel(
                "Memory in use", "percentunit",
                [Query(f"{_node('bytes_used')} / {_node('bytes_limit')}", "{{node_id}}")],
            ),
            Panel(
                "Disk in use", "percentunit",
                [Query(f"{_node('disk_bytes_used')} / ({_node('disk_bytes_limit')} > 0)", "{{node_id}}")],
            ),
            Panel(
                "Stored bytes", "bytes",
                [Query(f"sum by (tier, encoding) ({_node('stored_bytes')})", "{{tier}} {{encoding}}")],
                "By tier and encoding. A chunk may be in both tiers.", stacked=True,
            ),
            Panel(
                "Sent to readers", "Bps",
                [Query(_sum(_node("served_bytes_total"), "tier, encoding"), "{{tier}} {{encoding}}")],
                "By the tier that had the chunk, and by encoding.", stacked=True,
            ),
            Panel(
                "Stored by writers", "Bps",
                [Query(_sum(_node("written_bytes_total"), "encoding"), "{{encoding}}")], stacked=True,
            ),
            Panel(
                "Evicted", "short",
                [Query(_sum(_node("evictions_by_cause_total"), "cause"), "{{cause}}")],
                "Variants a second, by what the room was needed for.", stacked=True,
            ),
            Panel(
                "Refused", "short",
                [Query(_sum(_node("refused_puts_total"), "reason"), "{{reason}}")], "Chunks a second, by reason.",
            ),
            Panel(
                "Between the tiers", "short",
                [
                    Query(_sum(_node("promotions_total")), "to memory"),
                    Query(_sum(_node("demotions_total")), "to disk only"),
                    Query(f"sum({_node('dirty')})", "waiting for the disk"),
                ],
                "Variants a second, and the variants that wait now.",
            ),
            Panel(
                "Leases and pins", "short",
                [Query(f"sum({_node('leases')})", "leases"), Query(f"sum({_node('pinned')})", "pinned variants")],
            ),
        ),
    ),
    Row(
        "Health",
        (
            Panel("Nodes", "bool_on_off", [Query(_node("up"), "{{node_id}}")]),
            Panel(
                "Disk trouble", "short",
                [
                    Query(_sum(_node("disk_refused_total"), "node_id"), "{{node_id}} refused"),
                    Query(_sum(_node("disk_read_errors_total"), "node_id"), "{{node_id}} unreadable"),
                    Query(_sum(_node("damaged_total"), "node_id"), "{{node_id}} damaged"),
                ],
                "Chunks a second that the disk refused, could not read, or had damaged.",
            ),
            Panel(
                "Repair", "short",
                [
                    Query(f"sum({_node('repair_left')})", "missing replicas"),
                    Query(f"sum({_node('drain_left')})", "left to drain"),
                    Query(_sum(_node("repair_sent_total")), "copied a second"),
                    Query(_sum(_node("repair_failed_total")), "failed a second"),
                ],
            ),
            Panel(
                "Background loops that fail", "short", [Query(_node("background_failing"), "{{node_id}}")],
            ),
        ),
    ),
    Row(
        "Tenants (with --metrics-tenants)",
        (
            Panel(
                "Stored", "bytes",
                [Query("sum by (tenant) (kvstore_node_tenant_bytes)", "{{tenant}}")], stacked=True,
            ),
            Panel(
                "Used share of the quota", "percentunit",
                [
                    Query(
                        "sum by (tenant) (kvstore_node_tenant_bytes) / "
                        "sum by (tenant) (kvstore_node_tenant_limit_bytes)",
                        "{{tenant}}",
                    )
                ],
            ),
            Panel(
                "Hit rate", "percentunit",
                [
                    Query(
                        _ratio(
                            _sum("kvstore_node_tenant_hits_total", "tenant"),
                            _sum("kvstore_node_tenant_requested_chunks_total", "tenant"),
                        ),
                        "{{tenant}}",
                    )
                ],
            ),
        ),
    ),
)  # fmt: skip
