"""The metrics of a cluster and its storage nodes, which `kvstore serve --metrics-port` exports."""

from collections.abc import Iterator, Mapping

from kvstore_client.metric import Kind, Label, Metric
from kvstore_cluster.tallies import EvictionCause, Refusal, Tier
from kvstore_codec.encoding import Encoding

NODE_PREFIX = "kvstore_node_"
NODE_LABEL = Label("node_id", meaning="name of the node")
_TIER = Label("tier", tuple(Tier))
_ENCODING = Label("encoding", tuple(Encoding.families()), "family of encodings")
TENANT_LABEL = Label("tenant", meaning="a tenant, or `*` for all others; with `--metrics-tenants` only")

COORDINATOR_UP = Metric("kvstore_coordinator_up", Kind.GAUGE, "0 or 1", "Whether the coordinator answers.")
EPOCH = Metric(
    "kvstore_cluster_epoch", Kind.GAUGE, "changes", "Epoch of the membership; every change of it adds 1."
)
GATEWAY_FAILING = Metric(
    "kvstore_gateway_background_failing",
    Kind.GAUGE,
    "loops",
    "Background loops of `kvstore serve` that are failing, as the one that places nodes; its log says why.",
)
GATEWAY_ERRORS = Metric(
    "kvstore_gateway_background_errors_total",
    Kind.COUNTER,
    "errors",
    "Errors of background loops of `kvstore serve`.",
)
BUILD = Metric(
    "kvstore_build_info",
    Kind.GAUGE,
    "always 1",
    "Version of the service.",
    (Label("version", meaning="of the package"),),
)
NODE_UP = Metric("kvstore_node_up", Kind.GAUGE, "0 or 1", "Whether the storage node answers.", (NODE_LABEL,))
DISK_OK = Metric(
    "kvstore_node_disk_ok",
    Kind.GAUGE,
    "0 or 1",
    "0 if the node runs without its configured disk.",
    (NODE_LABEL,),
)
CLUSTER_METRICS = (COORDINATOR_UP, EPOCH, GATEWAY_FAILING, GATEWAY_ERRORS, BUILD, NODE_UP, DISK_OK)

_FIELDS = {
    "chunks": ("variants", "Stored variants of chunks."),
    "bytes_used": ("bytes", "Bytes of memory used by chunks."),
    "bytes_limit": ("bytes", "Bytes of memory for chunks."),
    "leases": ("leases", "Active leases."),
}
_GAUGES = {
    "memory_chunks": ("variants", "Stored variants that are in memory."),
    "disk_chunks": ("variants", "Stored variants that are on disk."),
    "disk_bytes_used": ("bytes", "Bytes of disk used by chunks."),
    "disk_bytes_limit": ("bytes", "Bytes of disk for chunks."),
    "disk_read_Bps": (
        "bytes per second", "Measured rate of one disk read at a time; 0 before enough was read."
    ),
    "events_overflows": (
        "events", "How often more blocks changed than the node remembers, so that it reported all of them."
    ),
    "disk_direct": ("0 or 1", "Whether the node reads and writes its disk past the page cache."),
    "disk_unreadable": ("variants", "Stored variants whose last read from the disk failed."),
    "pinned": ("variants", "Stored variants that are pinned."),
    "dirty": ("variants", "Stored variants that wait to be written to disk."),
    "background_failing": ("loops", "Background loops of the node's process that are failing; its log says why."),
    "repair_running": ("0 or 1", "Whether a repair pass is running."),
    "repair_round": ("rounds", "Last repair round in which every other node answered."),
    "repair_epoch": ("changes", "Membership epoch of the last repair pass in which every other node answered."),
    "repair_checked": ("variants", "Stored variants that the repair pass has checked."),
    "repair_total": ("variants", "Stored variants that the repair pass has to check."),
    "repair_left": ("variants", "Stored variants that an owner lacked after the last repair pass."),
    "draining": ("0 or 1", "Whether the node is draining."),
    "drain_left": ("variants", "Stored variants that a draining node has not yet copied to other nodes."),
    "drain_stuck": ("variants", "Stored variants of a draining node that no other node accepts."),
    "throttle_bps": ("bits per second", "Limit of `kvstore throttle` on what the node sends; only while there is one."),
    "disk_throttle_Bps": (
        "bytes per second", "Limit of `kvstore throttle` on the node's disk reads; only while there is one."
    ),
}  # fmt: skip
_COUNTERS = {
    "lookups": ("calls", "Lookups."),
    "hits": ("chunks", "Chunks that lookups found and that their callers can use."),
    "approximate_hits": ("chunks", "Hits in another context than the requested one."),
    "hit_tokens": ("tokens", "Tokens of the hits, as callers report them."),
    "misses": ("chunks", "Chunks that lookups did not find."),
    "unusable": ("chunks", "Chunks that lookups found behind a missing chunk of their text."),
    "puts": ("chunks", "Chunks that were stored."),
    "put_rejected": ("chunks", "Chunks that were refused; refused_puts counts them by reason."),
    "reads": ("ranges", "Ranges of frames that were read."),
    "bytes_in": ("bytes", "Bytes received for chunks."),
    "bytes_out": ("bytes", "Bytes of chunks sent to readers."),
    "evictions": ("variants", "Variants removed to free space; evictions_by_cause counts them by cause."),
    "texts_cut": ("chunks", "Chunks refused because only the beginning of their own text could be evicted."),
    "deletes": ("variants", "Variants removed by callers."),
    "expired": ("variants", "Variants removed because their time was over."),
    "promotions": ("variants", "Variants copied from disk to memory."),
    "demotions": ("variants", "Variants removed from memory that stay on disk."),
    "disk_refused": ("chunks", "Chunks that the disk refused; they are in memory only."),
    "damaged": ("variants", "Copies that were damaged, and removed."),
    "disk_read_errors": ("reads", "Reads that failed in every attempt; the chunk stays on disk."),
    "frame_disk_reads": ("reads", "Disk reads for single frames. One may cover several ranges."),
    "frame_disk_bytes": ("bytes", "Bytes read from disk for single frames, whole blocks."),
    "ranges_dropped": ("ranges", "Ranges of single frames that callers cancelled."),
    "repair_sent": ("variants", "Variants copied to other nodes."),
    "repair_sent_bytes": ("bytes", "Bytes of variants copied to other nodes."),
    "repair_refused": ("variants", "Copies that another node refused, because it or a quota is full."),
    "repair_failed": ("variants", "Copies that failed for another reason."),
    "background_errors": ("errors", "Errors of background loops of the node's process."),
}  # fmt: skip
_SAMPLES: Mapping[str, tuple[Kind, str, str, tuple[Label, ...]]] = {
    "stored_bytes": (Kind.GAUGE, "bytes", "Bytes of chunks in each tier.", (_TIER, _ENCODING)),
    "written_bytes": (Kind.COUNTER, "bytes", "Bytes of chunks that were stored.", (_ENCODING,)),
    "served_bytes": (
        Kind.COUNTER, "bytes", "Bytes of chunks sent to readers, by the tier that had them.", (_TIER, _ENCODING)
    ),
    "evictions_by_cause": (
        Kind.COUNTER, "variants", "Variants removed to free space.", (Label("cause", tuple(EvictionCause)),)
    ),
    "refused_puts": (
        Kind.COUNTER, "chunks", "Chunks that were refused.", (Label("reason", tuple(Refusal)),)
    ),
    "disk_chunks_by_key": (
        Kind.GAUGE,
        "variants",
        "Stored variants on disk by the key that encrypts them; only with `--encryption-key-file`. A key that is "
        "missing here encrypts nothing on the node's disk any more.",
        (Label("key", meaning="id of the key, or `plain`"),),
    ),
    "quotas_nearly_full": (
        Kind.GAUGE, "tenants", "Tenants that have stored 90 % or more of their share of a quota here.", ()
    ),
    "tenant_bytes": (Kind.GAUGE, "bytes", "Bytes that a tenant has stored.", (TENANT_LABEL,)),
    "tenant_limit_bytes": (Kind.GAUGE, "bytes", "The node's share of a tenant's quota.", (TENANT_LABEL,)),
    "tenant_requested_chunks": (
        Kind.COUNTER, "chunks", "Chunks that a tenant's lookups asked for.", (TENANT_LABEL,)
    ),
    "tenant_hits": (Kind.COUNTER, "chunks", "Of these, chunks that were found and used.", (TENANT_LABEL,)),
    "tenant_hit_tokens": (Kind.COUNTER, "tokens", "Tokens of a tenant's hits.", (TENANT_LABEL,)),
}  # fmt: skip


_EVENT_GAUGES = {
    "nodes": ("nodes", "Storage nodes whose blocks the publisher of KV events knows."),
    "tenants": ("tenants", "Tenants that have KV events."),
    "blocks": ("blocks", "Blocks that the publisher of KV events knows."),
    "subscriptions": ("subscriptions", "Subscriptions to KV events."),
}  # fmt: skip
_EVENT_COUNTERS = {
    "batches": ("batches", "Batches of KV events."),
    "dropped": ("batches", "Batches of KV events that were dropped before they were sent."),
    "unpublished": ("changes", "Changes of blocks of too many tenants, which were not published."),
    "resyncs": ("events", "How often a node reported all of its blocks."),
    "replays": ("requests", "Requests for missed batches that were answered with these."),
    "snapshots": ("requests", "Requests for missed batches that were answered with all blocks."),
}  # fmt: skip


def _metric(name: str, kind: Kind, unit: str, meaning: str, labels: tuple[Label, ...] = ()) -> Metric:
    ending = "_total" if kind is Kind.COUNTER else ""
    return Metric(f"{NODE_PREFIX}{name}{ending}", kind, unit, meaning, (NODE_LABEL, *labels))


GAUGES = {name: _metric(name, Kind.GAUGE, *row) for name, row in (_FIELDS | _GAUGES).items()}
COUNTERS = {name: _metric(name, Kind.COUNTER, *row) for name, row in _COUNTERS.items()}
SAMPLES = {name: _metric(name, *row) for name, row in _SAMPLES.items()}
EVENTS = {name: Metric(f"kvstore_events_{name}", Kind.GAUGE, *row) for name, row in _EVENT_GAUGES.items()} | {
    name: Metric(f"kvstore_events_{name}_total", Kind.COUNTER, *row) for name, row in _EVENT_COUNTERS.items()
}
"""Of a service that publishes KV events."""
FIELDS = tuple(_FIELDS)
"""Gauges that are fields of a node's answer. The others are in its map of gauges."""


def node_metrics() -> Iterator[Metric]:
    """All metrics of a storage node and of the cluster."""
    yield from (*CLUSTER_METRICS, *EVENTS.values(), *GAUGES.values(), *COUNTERS.values(), *SAMPLES.values())
