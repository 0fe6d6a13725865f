"""What the chart says twice is the same in both places."""

import json
import re
import runpy
import tomllib
from typing import Any

import pytest
import yaml

from tests.helm.chart import CHART, ROOT, ci_values, defaults, render

SOURCES = ROOT / "kvstore_service" / "observability" / "files"


def test_the_readme_has_all_values() -> None:
    made = runpy.run_path(str(ROOT / "helm" / "readme.py"))["rendered"]()
    assert (CHART / "README.md").read_text() == made, "run `python helm/readme.py`"


def test_every_value_is_described() -> None:
    text = (CHART / "README.md").read_text()
    missing = [path for path in paths(defaults()) if f"| `{path}` |" not in text]
    assert missing == []


@pytest.mark.parametrize("name", ["alerts.yaml", "dashboard.json"])
def test_copies_are_current(name: str) -> None:
    """Helm reads no files outside of the chart."""
    assert (CHART / "files" / name).read_text() == (SOURCES / name).read_text()


def test_what_is_installed_are_the_alerts_and_the_dashboard() -> None:
    manifests = render(ci_values("production"))
    alerts = yaml.safe_load((SOURCES / "alerts.yaml").read_text())
    assert manifests["PrometheusRule", "kv-kvstore"]["spec"] == alerts
    dashboard = manifests["ConfigMap", "kv-kvstore-dashboard"]["data"]["kvstore.json"]
    assert json.loads(dashboard) == json.loads((SOURCES / "dashboard.json").read_text())


def test_versions_are_those_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["appVersion"] == project["version"]
    (ray,) = re.findall(r"(?m)^ray==(.*)$", (ROOT / "constraints.txt").read_text())
    assert defaults()["kuberay"]["rayVersion"] == ray


def test_the_schema_knows_every_value_and_no_other() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    assert schema["properties"].pop("global") == {"type": "object"}  # Helm's own
    _compare(defaults(), schema, schema["definitions"], "")


def _compare(values: dict[str, Any], schema: dict[str, Any], definitions: dict[str, Any], path: str) -> None:
    """Objects that users extend, such as labels, have no properties in the schema."""
    assert schema["properties"].keys() == values.keys() == set(schema["required"]), path
    assert schema["additionalProperties"] is False, path
    for key, inner in schema["properties"].items():
        name = inner.get("$ref", "").rpartition("/")[2]
        inner = definitions.get(name, inner)
        if isinstance(values[key], dict) and values[key] and "properties" in inner and "required" in inner:
            _compare(values[key], inner, definitions, f"{path}.{key}")


def paths(values: dict[str, Any], prefix: str = "") -> list[str]:
    """Paths of all values that have no values below them, such as `tls.source`."""
    found: list[str] = []
    for key, value in values.items():
        described = not isinstance(value, dict) or not value or key in ("resources", "labels")
        found += [prefix + key] if described else paths(value, f"{prefix}{key}.")
    return found
