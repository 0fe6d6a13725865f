"""The Grafana dashboard `files/dashboard.json`: `python -m kvstore_service.observability.dashboard > FILE` makes it."""

import json
from collections.abc import Iterator
from typing import Any

from kvstore_service.observability.dashboard_rows import ROWS
from kvstore_service.observability.panels import Panel

_COLUMNS, _HEIGHT = 24, 8
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}


def queries() -> Iterator[tuple[str, str]]:
    """Title of the panel and PromQL of each query."""
    for row in ROWS:
        for panel in row.panels:
            for query in panel.queries:
                yield f"{row.title}: {panel.title}", query.expression


def dashboard() -> dict[str, Any]:
    """The dashboard in Grafana's format."""
    panels: list[dict[str, Any]] = []
    top = 0
    for row in ROWS:
        place = {"h": 1, "w": _COLUMNS, "x": 0, "y": top}
        panels.append(
            {"id": len(panels) + 1, "type": "row", "title": row.title, "gridPos": place, "panels": []}
        )
        top, left = top + 1, 0
        for panel in row.panels:
            height = _HEIGHT // 2 if panel.kind == "stat" else _HEIGHT
            if left + panel.width > _COLUMNS:
                top, left = top + height, 0
            place = {"h": height, "w": panel.width, "x": left, "y": top}
            panels.append(_panel(len(panels) + 1, panel, place))
            left += panel.width
        top += height
    return {
        "title": "KV cache service",
        "uid": "kvstore",
        "tags": ["kvstore"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "templating": {"list": [_SOURCE_VARIABLE, _NODE_VARIABLE]},
        "panels": panels,
    }


_SOURCE_VARIABLE = {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"}
_NODE_VARIABLE = {
    "name": "node",
    "label": "Node",
    "type": "query",
    "datasource": _SOURCE,
    "query": {"query": "label_values(kvstore_node_up, node_id)", "refId": "nodes"},
    "includeAll": True,
    "multi": True,
    "allValue": ".*",
    "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
    "refresh": 2,
    "sort": 3,
}


def _panel(number: int, panel: Panel, place: dict[str, int]) -> dict[str, Any]:
    steps = [{"color": color, "value": value} for color, value in panel.thresholds]
    defaults: dict[str, Any] = {
        "unit": panel.unit,
        "min": 0,
        "thresholds": {"mode": "absolute", "steps": steps},
    }
    options: dict[str, Any] = {"reduceOptions": {"calcs": ["lastNotNull"]}}
    if panel.kind == "timeseries":
        fill = {"fillOpacity": 20, "stacking": {"mode": "normal"}} if panel.stacked else {"fillOpacity": 0}
        defaults |= {
            "color": {"mode": "palette-classic"},
            "custom": {"lineWidth": 1, "showPoints": "never"} | fill,
        }
        options = {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}}
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.meaning,
        "datasource": _SOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": options,
        "targets": [
            {
                "refId": chr(ord("A") + place),
                "datasource": _SOURCE,
                "expr": query.expression,
                "legendFormat": query.legend,
                "range": True,
            }
            for place, query in enumerate(panel.queries)
        ],
    }


if __name__ == "__main__":
    print(json.dumps(dashboard(), indent=2))  # noqa: T201
