"""What a metric is: the row of a table from which metrics are exported, documented and tested."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from prometheus_client import Counter, Gauge, Histogram

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""Buckets of durations, seconds."""
RATIOS = (0.1, 0.25, 0.5, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.5, 2.0, 4.0, 10.0)
"""Buckets of a ratio that should be 1."""


class Kind(StrEnum):
    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Label:
    """A label of a metric. `values` are all that it can have; empty: `meaning` says which."""

    name: str
    values: tuple[str, ...] = ()
    meaning: str = ""


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric, by the name that its samples have in Prometheus: that of a counter ends with `_total`, that of a
    histogram has no `_bucket`. `unit` is a plural noun."""

    name: str
    kind: Kind
    unit: str
    meaning: str
    labels: tuple[Label, ...] = ()
    buckets: Sequence[float] = SECONDS
    """Of a histogram: its upper bounds, in `unit`."""

    @property
    def family(self) -> str:
        """The name as Prometheus' client libraries take it."""
        return self.name.removesuffix("_total") if self.kind is Kind.COUNTER else self.name

    @property
    def label_names(self) -> tuple[str, ...]:
        return tuple(label.name for label in self.labels)

    def counter(self) -> Counter:
        """A counter of this metric that no registry has."""
        return Counter(self.family, self.meaning, self.label_names, registry=None)

    def gauge(self) -> Gauge:
        """A gauge of this metric that no registry has."""
        return Gauge(self.family, self.meaning, self.label_names, registry=None)

    def histogram(self) -> Histogram:
        """A histogram of this metric that no registry has."""
        return Histogram(self.family, self.meaning, self.label_names, buckets=self.buckets, registry=None)
