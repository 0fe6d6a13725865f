"""What a dashboard consists of."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Query:
    """PromQL with Grafana's variables, and the legend of its series."""

    expression: str
    legend: str


@dataclass(frozen=True, slots=True)
class Panel:
    """One chart, or one number with `kind` "stat". `unit` is one of Grafana's units."""

    title: str
    unit: str
    queries: Sequence[Query]
    meaning: str = ""
    kind: str = "timeseries"
    width: int = 8
    stacked: bool = False
    thresholds: Sequence[tuple[str, float | None]] = (("green", None),)


@dataclass(frozen=True, slots=True)
class Row:
    title: str
    panels: Sequence[Panel]
