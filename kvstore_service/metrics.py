"""The cluster's numbers for Prometheus, asked for at every scrape and never kept twice."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

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


class ClusterCollector(Collector):
    """kvstore_coordinator_up, kvstore_cluster_epoch, and for each node kvstore_node_up, its gauges and its
    counters. `stats` raises ServiceError when the cluster does not answer."""

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
    gauges = {
        name: GaugeMetricFamily(f"kvstore_node_{name}", text, labels=["node_id"])
        for name, text in _GAUGES.items()
    }
    counters: dict[str, CounterMetricFamily] = {}
    for node in reply.nodes:
        label = [node.member.node_id]
        answered = node.HasField("stats")
        up.add_metric(label, int(answered))
        if not answered:
            continue
        for name, gauge in gauges.items():
            gauge.add_metric(label, getattr(node.stats, name))
        for name, value in sorted(node.stats.counters.items()):
            if name not in counters:
                counters[name] = CounterMetricFamily(
                    f"kvstore_node_{name}", f"{name} since the node started.", labels=["node_id"]
                )
            counters[name].add_metric(label, value)
    yield up
    yield from gauges.values()
    yield from counters.values()
