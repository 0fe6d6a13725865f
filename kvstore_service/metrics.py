"""The cluster's numbers for Prometheus, asked for at every scrape and never kept twice."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_codec.errors import ServiceError
from kvstore_service.listen import Address, address_error

_GAUGES = {
    "chunks": "Stored variants of chunks.",
    "bytes_used": "Bytes of memory taken by chunks.",
    "bytes_limit": "Bytes of memory for chunks.",
    "leases": "Leases that have not ended.",
}
# Those of a node's own gauges that need more words than their name has.
_TEXTS = {
    "memory_chunks": "Stored variants that are in memory.",
    "disk_chunks": "Stored variants that are on disk.",
    "disk_bytes_used": "Bytes of disk taken by chunks.",
    "disk_bytes_limit": "Bytes of disk for chunks.",
    "disk_unreadable": "Stored variants whose last read from the disk failed.",
    "pinned": "Stored variants that are pinned.",
    "draining": "Whether the node is draining.",
    "drain_left": "Stored variants that a draining node has still to give.",
    "background_failing": "Background loops of the node's process that fail now; its log says why.",
    "repair_running": "Whether a walk of repair is under way.",
    "repair_round": "Last round of repair in which every other node answered.",
    "repair_epoch": "Epoch of the last walk in which every other node answered.",
    "repair_checked": "Stored variants that the walk of repair has checked.",
    "repair_total": "Stored variants that the walk of repair checks.",
    "repair_left": "Stored variants that an owner lacked after the last walk of repair.",
}


class ClusterCollector(Collector):
    """kvstore_coordinator_up, kvstore_cluster_epoch, and for each node kvstore_node_up, kvstore_node_disk_ok, its
    gauges and its counters. `stats` raises ServiceError when the cluster does not answer."""

    def __init__(self, stats: Callable[[], pb.ClusterStatsReply]) -> None:
        self._stats = stats

    def describe(self) -> list[Metric]:
        """Nothing: registering must not ask the cluster."""
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
        yield from _node_metrics(reply)


@contextmanager
def metrics_endpoint(address: Address) -> Iterator[CollectorRegistry]:
    """Serves what is registered over HTTP at /metrics. Raises AddressInUseError."""
    registry = CollectorRegistry()
    try:
        server, thread = start_http_server(address.port, address.host, registry)
    except OSError as error:
        raise address_error(address, error.strerror or str(error)) from error
    try:
        yield registry
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _node_metrics(reply: pb.ClusterStatsReply) -> Iterator[Metric]:
    up = GaugeMetricFamily("kvstore_node_up", "Whether the storage node answers.", labels=["node_id"])
    disk = GaugeMetricFamily(
        "kvstore_node_disk_ok", "0 when the node does without a disk that it should have.", labels=["node_id"]
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
