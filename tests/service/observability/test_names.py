"""Without Prometheus: the dashboard and the alerts name only metrics and label values that the table has."""

import re

import pytest
import yaml

from kvstore_client.metric import Kind, Metric
from kvstore_service.observability import FILES
from kvstore_service.observability.dashboard import queries
from kvstore_service.observability.table import METRICS

ROWS = [row for rows in METRICS.values() for row in rows]
EXPRESSIONS = [query for _, query in queries()] + [
    rule["expr"]
    for group in yaml.safe_load((FILES / "alerts.yaml").read_text())["groups"]
    for rule in group["rules"]
]
_SELECTOR = re.compile(r"(?:(?P<name>kvstore_\w+)|(?=\{__name__))(?:\{(?P<matchers>[^}]*)\})?")
_MATCHER = re.compile(r'(\w+)(=~|=)"([^"]*)"')


def samples(row: Metric) -> set[str]:
    endings = ("_bucket", "_sum", "_count") if row.kind is Kind.HISTOGRAM else ("",)
    return {row.name + ending for ending in endings}


def selected(name: str | None, matchers: dict[str, str]) -> list[Metric]:
    pattern = re.escape(name) if name is not None else matchers["__name__"]
    return [row for row in ROWS if any(re.fullmatch(pattern, sample) for sample in samples(row))]


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_an_expression_selects_what_the_table_has(expression: str) -> None:
    found = 0
    for selector in _SELECTOR.finditer(expression):
        matchers = {label: value for label, _, value in _MATCHER.findall(selector["matchers"] or "")}
        rows = selected(selector["name"], matchers)
        assert rows, selector[0]
        for label, wanted in matchers.items():
            if label == "__name__" or wanted.startswith("$"):
                continue
            for row in rows:
                (known,) = (one for one in row.labels if one.name == label)
                for alternative in wanted.split("|") if "(" not in wanted else [wanted]:
                    assert any(re.fullmatch(alternative, value) for value in known.values), (label, wanted)
        found += 1
    assert found
