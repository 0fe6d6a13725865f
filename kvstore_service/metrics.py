"""Prometheus metrics of a cluster. Each scrape asks the cluster; no values are cached."""

from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_codec.errors import ServiceError

_GAUGES = {
    "chunks": "Stored variants of chunks.",
    "bytes_used": "Bytes of memory used by chunks.",
    "bytes_limit": "Bytes of memory for chunks.",
    "leases": "Active leases.",
}
# Help texts for those gauges of a node whose name does not explain them.
_TEXTS = {
    "memory_chunks": "Stored variants that are in memory.",
    "disk_chunks": "Stored variants that are on disk.",
    "disk_bytes_used": "Bytes of disk used by chunks.",
    "disk_bytes_limit": "Bytes of disk for chunks.",
    "disk_read_Bps": "Measured rate of one disk read at a time, bytes per second; 0 before enough was read.",
    "disk_direct": "Whether the node reads and writes its disk past the page cache.",
    "disk_unreadable": "Stored variants whose last read from the disk failed.",
    "pinned": "Stored variants that are pinned.",
    "draining": "Whether the node is draining.",
    "drain_left": "Stored variants that a draining node has not yet copied to other nodes.",
    "events_overflows": "How often more blocks changed than the node remembers, so that it reported all of them.",
    "background_failing": "Background loops of the node's process that are failing; its log says why.",
    "repair_running": "Whether a repair pass is running.",
    "repair_round": "Last repair round in which every other node answered.",
    "repair_epoch": "Membership epoch of the last repair pass in which every other node answered.",
    "repair_checked": "Stored variants that the repair pass has checked.",
    "repair_total": "Stored variants that the repair pass has to check.",
    "repair_left": "Stored variants that an owner lacked after the last repair pass.",
}


_EVENT_TEXTS = {
    "nodes": "Storage nodes whose blocks the publisher of KV events knows.",
    "tenants": "Tenants that have KV events.",
    "blocks": "Blocks that the publisher of KV events knows.",
    "subscriptions": "Subscriptions to KV events.",
    "batches": "Batches of KV events.",
    "dropped": "Batches of KV events that were dropped before they were sent.",
    "unpublished": "Changes of blocks of too many tenants, which were not published.",
    "resyncs": "How often a node reported all of its blocks.",
    "replays": "Requests for missed batches that were answered with these.",
    "snapshots": "Requests for missed batches that were answered with all blocks.",
}
_EVENT_GAUGES = ("nodes", "tenants", "blocks", "subscriptions")


class ClusterCollector(Collector):
    """Collects kvstore_coordinator_up and kvstore_cluster_epoch, and for each node kvstore_node_up,
    kvstore_node_disk_ok, its gauges and its counters. `stats` raises ServiceError if the cluster does not answer."""

    def __init__(self, stats: Callable[[], pb.ClusterStatsReply]) -> None:
        self._stats = stats

    def describe(self) -> list[Metric]:
        """Returns nothing, so that registering the collector does not ask the cluster."""
        return []

    def collect(self) -> Iterator[Metric]:
        up = GaugeMetricFamily("kvstore_coordinator_up", "Whether the coordinator answers.")
        try:
            reply = self._stats()
        except ServiceError:
            up.add_metric([], 0)
            yield up
            return
        up.add_metric([], 1)
        yield up
        yield GaugeMetricFamily("kvstore_cluster_epoch", "Epoch of the membership.", value=reply.epoch)
        yield from _event_metrics(reply)
        yield from _node_metrics(reply)


def _event_metrics(reply: pb.ClusterStatsReply) -> Iterator[Metric]:
    for name, value in sorted(reply.events.items()):
        family = GaugeMetricFamily if name in _EVENT_GAUGES else CounterMetricFamily
        yield family(f"kvstore_events_{name}", _EVENT_TEXTS.get(name, name), value=value)


def _node_metrics(reply: pb.ClusterStatsReply) -> Iterator[Metric]:
    up = GaugeMetricFamily("kvstore_node_up", "Whether the storage node answers.", labels=["node_id"])
    disk = GaugeMetricFamily(
        "kvstore_node_disk_ok", "0 if the node runs without its configured disk.", labels=["node_id"]
    )
    gauges: dict[str, Metric] = {}
    counters: dict[str, Metric] = {}
    for node in reply.nodes:
        label = [node.member.node_id]
        answered = node.HasField("stats")
        up.add_metric(label, int(answered))
        if not answered:
            continue
        disk.add_metric(label, int(not node.stats.disk_error))
        for name, text in _GAUGES.items():
            _family(gauges, GaugeMetricFamily, name, text).add_metric(label, getattr(node.stats, name))
        for name, value in sorted(node.stats.gauges.items()):
            _family(gauges, GaugeMetricFamily, name, _TEXTS.get(name, name)).add_metric(label, value)
        for name, value in sorted(node.stats.counters.items()):
            text = f"{name} since the node started."
            _family(counters, CounterMetricFamily, name, text).add_metric(label, value)
    yield up
    yield disk
    yield from gauges.values()
    yield from counters.values()


def _family(known: dict[str, Any], family: Callable[..., Any], name: str, text: str) -> Any:
    if name not in known:
        known[name] = family(f"kvstore_node_{name}", text, labels=["node_id"])
    return known[name]
