"""The metric of estimated bandwidths, which is read from the links when somebody asks."""

from collections.abc import Iterable
from weakref import WeakSet

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kvstore_client import metric_table as table
from kvstore_client.planning.links import Links


class BandwidthCollector(Collector):
    """Collects the bandwidth of each endpoint. Of several clients in a process the fastest one counts: the others may
    have sent little."""

    def __init__(self) -> None:
        self._links: WeakSet[Links] = WeakSet()

    def watch(self, links: Links) -> None:
        self._links.add(links)

    def describe(self) -> Iterable[Metric]:
        return [self._family()]

    def collect(self) -> Iterable[Metric]:
        found: dict[str, float] = {}
        for links in list(self._links):
            for endpoint, (bandwidth_Bps, _) in links.snapshot().items():  # noqa: N806
                found[endpoint] = max(bandwidth_Bps, found.get(endpoint, 0.0))
        family = self._family()
        for endpoint, bandwidth_Bps in sorted(found.items()):  # noqa: N806
            family.add_metric([endpoint], bandwidth_Bps)
        return [family]

    def _family(self) -> GaugeMetricFamily:
        metric = table.BANDWIDTH
        return GaugeMetricFamily(metric.family, metric.meaning, labels=metric.label_names)
