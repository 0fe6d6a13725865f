"""The chart, rendered by Helm in this process."""

import base64
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from helm_python.chart import Chart
from helm_python.errors import HelmError

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "kvstore"
CI_VALUES = sorted((CHART / "ci").glob("*.yaml"))

Values = dict[str, Any]
Manifest = dict[str, Any]


class RefusedError(Exception):
    """Helm did not render the chart. The text is what its user reads."""


class Manifests:
    """What a chart renders, by kind and name."""

    def __init__(self, texts: Mapping[str, str]) -> None:
        self.texts = texts
        """Rendered text by the path of its template, without NOTES.txt."""
        self._by_name: dict[tuple[str, str], Manifest] = {}
        for manifest in (document for text in texts.values() for document in documents(text)):
            name = (manifest["kind"], manifest["metadata"]["name"])
            assert name not in self._by_name, f"two objects are {name}"
            self._by_name[name] = manifest

    def __iter__(self) -> Iterator[Manifest]:
        return iter(self._by_name.values())

    def __getitem__(self, name: tuple[str, str]) -> Manifest:
        return self._by_name[name]

    def __contains__(self, name: tuple[str, str]) -> bool:
        return name in self._by_name

    def of(self, kind: str) -> list[Manifest]:
        return [manifest for manifest in self if manifest["kind"] == kind]

    @property
    def pods(self) -> list[Manifest]:
        """Pods and templates of pods, each with metadata and spec."""
        found: list[Manifest] = []
        for manifest in self:
            spec = manifest.get("spec", {})
            if manifest["kind"] == "Pod":
                found.append(manifest)
            elif manifest["kind"] == "RayCluster":
                found += [spec["headGroupSpec"]["template"]]
                found += [group["template"] for group in spec["workerGroupSpecs"]]
            elif "template" in spec:
                found.append(spec["template"])
        return found

    def secret(self, name: str, key: str) -> str:
        return base64.b64decode(self["Secret", name]["data"][key]).decode()

    def pod(self, component: str) -> Manifest:
        (found,) = (
            pod for pod in self.pods if pod["metadata"]["labels"]["app.kubernetes.io/component"] == component
        )
        return found

    def container(self, component: str) -> Manifest:
        (container,) = self.pod(component)["spec"]["containers"]
        return container


def render(values: Values | None = None, name: str = "kv", namespace: str = "llm") -> Manifests:
    """Raises RefusedError."""
    texts = rendered_texts(values or {}, name, namespace)
    return Manifests({path: text for path, text in texts.items() if not path.endswith("NOTES.txt")})


def rendered_texts(values: Values, name: str = "kv", namespace: str = "llm") -> dict[str, str]:
    """Rendered text by the path of its template. Raises RefusedError."""
    try:
        texts: dict[str, str] = _chart().render(values, name=name, namespace=namespace)
    except HelmError as error:
        raise RefusedError(str(error)) from error
    return texts


def documents(text: str) -> list[Manifest]:
    return [document for document in yaml.load_all(text, yaml.CSafeLoader) if document]


def ci_values(name: str) -> Values:
    return values_of(CHART / "ci" / f"{name}-values.yaml")


def values_of(path: Path) -> Values:
    loaded: Values = yaml.safe_load(path.read_text())
    return loaded


def defaults() -> Values:
    return values_of(CHART / "values.yaml")


def with_value(path: str, value: object, base: Values | None = None) -> Values:
    """Values like `base` but for the one at the path, such as `tls.source`."""
    *parents, last = path.split(".")
    result = dict(base or {})
    inner = result
    for key in parents:
        inner[key] = dict(inner.get(key) or {})
        inner = inner[key]
    inner[last] = value
    return result


def mentions(message: str, path: str) -> bool:
    """Whether a message names the value at the path, as sentences of the chart or Helm's check of the schema do."""
    return bool(re.search(rf"(?<![\w.]){re.escape(path)}(?![\w])|'/{path.replace('.', '/')}[/']", message))


@cache
def _chart() -> Chart:
    return Chart.load(CHART)
