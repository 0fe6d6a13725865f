"""Prometheus metrics of a cluster. Each scrape asks the cluster; no values are cached."""

from collections import Counter
from collections.abc import Callable, Iterator
from importlib.metadata import version

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_client.metric import Kind, Metric
from kvstore_cluster.background import background_health
from kvstore_cluster.tallies import OTHER_TENANTS
from kvstore_codec.errors import ServiceError
from kvstore_service.observability import node_metrics as table

_FAMILIES = {Kind.GAUGE: GaugeMetricFamily, Kind.COUNTER: CounterMetricFamily}


class ClusterCollector(Collector):
    """Collects the metrics of `node_metrics`. `stats` raises ServiceError if the cluster does not answer.

    Of the metrics with a tenant, those of `tenants` tenants are collected one by one: the first ones that are seen, the
    largest of them first. They stay the same, so that each has a series without gaps. The others are added up as
    OTHER_TENANTS. Without `tenants` there are no such metrics."""

    def __init__(self, stats: Callable[[], pb.ClusterStatsReply], *, tenants: int = 0) -> None:
        self._stats = stats
        self._most_tenants = tenants
        self._tenants: dict[str, None] = {}

    def describe(self) -> list[Family]:
        """Returns nothing, so that registering the collector does not ask the cluster."""
        return []

    def collect(self) -> Iterator[Family]:
        families: dict[str, GaugeMetricFamily | CounterMetricFamily] = {}

        def add(metric: Metric, labels: list[str], value: float) -> None:
            family = families.get(metric.name)
            if family is None:
                made = _FAMILIES[metric.kind](metric.family, metric.meaning, labels=metric.label_names)
                family = families[metric.name] = made
            family.add_metric(labels, value)

        add(table.BUILD, [version("kvstore-service")], 1)
        health = background_health()  # of this process, which started the cluster
        add(table.GATEWAY_FAILING, [], len(health.failing))
        add(table.GATEWAY_ERRORS, [], health.errors)
        try:
            reply = self._stats()
        except ServiceError:
            add(table.COORDINATOR_UP, [], 0)
        else:
            add(table.COORDINATOR_UP, [], 1)
            add(table.EPOCH, [], reply.epoch)
            self._choose_tenants(reply)
            for name, metric in table.EVENTS.items():
                if name in reply.events:
                    add(metric, [], reply.events[name])
            for node in reply.nodes:
                self._add_node(node, add)
        yield from families.values()

    def _add_node(self, node: pb.NodeStatus, add: Callable[[Metric, list[str], float], None]) -> None:
        label, answered, stats = [node.member.node_id], node.HasField("stats"), node.stats
        add(table.NODE_UP, label, int(answered))
        if not answered:
            return
        add(table.DISK_OK, label, int(not stats.disk_error))
        gauges = {name: getattr(stats, name) for name in table.FIELDS} | dict(stats.gauges)
        # A node of another version may have numbers that this table lacks, or lack some of them.
        for rows, values in ((table.GAUGES, gauges), (table.COUNTERS, stats.counters)):
            for name, metric in rows.items():
                if name in values:
                    add(metric, label, values[name])
        summed: Counter[tuple[str, tuple[str, ...]]] = Counter()
        for sample in stats.samples:
            known, labels = table.SAMPLES.get(sample.name), tuple(sample.labels)
            if known is None or len(labels) + 1 != len(known.labels):
                continue
            if known.labels[-1] is table.TENANT_LABEL:
                if not self._most_tenants:
                    continue
                labels = (labels[0] if labels[0] in self._tenants else OTHER_TENANTS,)
            summed[sample.name, labels] += sample.value
        for (name, labels), value in summed.items():
            add(table.SAMPLES[name], [*label, *labels], value)

    def _choose_tenants(self, reply: pb.ClusterStatsReply) -> None:
        sizes: Counter[str] = Counter()
        for node in reply.nodes:
            for sample in node.stats.samples:
                if sample.name == "tenant_bytes" and sample.labels[0] != OTHER_TENANTS:
                    sizes[sample.labels[0]] += sample.value
        for tenant, _ in sizes.most_common():
            if len(self._tenants) < self._most_tenants:
                self._tenants.setdefault(tenant)
