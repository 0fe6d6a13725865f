"""The rendered manifests of the chart."""

import base64
import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

CHART = Path(__file__).parents[3] / "helm" / "kvstore"
NAMESPACE = "default"
Manifest = dict[str, Any]


class Manifests:
    """Manifests by kind and name."""

    def __init__(self, release: str, values: Mapping[str, Any], chart: Path = CHART) -> None:
        """Renders the chart with real Helm. Raises Helm's error for values that the chart refuses."""
        from helm_python.chart import Chart

        rendered = Chart.load(str(chart)).render(dict(values), name=release)
        texts = [text for name, text in rendered.items() if name.endswith(".yaml")]
        self.all: list[Manifest] = [each for text in texts for each in yaml.safe_load_all(text) if each]

    def of(self, kind: str) -> list[Manifest]:
        return [manifest for manifest in self.all if manifest["kind"] == kind]

    def get(self, kind: str, name: str) -> Manifest:
        """Raises KeyError."""
        for manifest in self.of(kind):
            if manifest["metadata"]["name"] == name:
                return manifest
        raise KeyError(f"there is no {kind} {name}")

    def files(self, kind: str, name: str) -> dict[str, bytes]:
        """Content of a ConfigMap or Secret, by key."""
        decoded = base64.b64decode if kind == "Secret" else str.encode
        return {key: decoded(text) for key, text in self.get(kind, name)["data"].items()}

    def workload(self, component: str) -> "Workload":
        """What runs the pods of a component. Raises KeyError."""
        for kind in ("StatefulSet", "Deployment", "Job", "Pod"):
            for manifest in self.of(kind):
                if manifest["metadata"]["labels"]["app.kubernetes.io/component"] == component:
                    return Workload.of(manifest)
        for cluster in self.of("RayCluster"):
            for workload in Workload.of_ray(cluster):
                if workload.component == component:
                    return workload
        raise KeyError(f"nothing runs {component}")


class Workload:
    """What Kubernetes, or KubeRay, makes pods of, with their labels and specification."""

    def __init__(self, name: str, template: Manifest, replicas: int) -> None:
        self.name, self.replicas = name, replicas
        self.labels: dict[str, str] = template["metadata"]["labels"]
        self.spec: Manifest = template["spec"]

    @property
    def component(self) -> str:
        return self.labels["app.kubernetes.io/component"]

    def pod(self, ordinal: int) -> str:
        """Name of a pod."""
        return f"{self.name}-{ordinal}"

    @classmethod
    def of(cls, manifest: Manifest) -> "Workload":
        name, spec = manifest["metadata"]["name"], manifest["spec"]
        if manifest["kind"] == "Pod":
            return cls(name, manifest, 1)
        return cls(name, spec["template"], spec.get("replicas", 1))

    @classmethod
    def of_ray(cls, cluster: Manifest) -> list["Workload"]:
        """Head and worker groups of a RayCluster whose containers have commands of their own. KubeRay runs these, and
        adds the Ray token to their environment."""
        cluster = copy.deepcopy(cluster)
        spec = cluster["spec"]
        secret = {"name": spec["authOptions"]["secretName"], "key": "auth_token"}
        token = [
            {"name": "RAY_AUTH_MODE", "value": spec["authOptions"]["mode"]},
            {"name": "RAY_AUTH_TOKEN", "valueFrom": {"secretKeyRef": secret}},
        ]
        groups = [(spec["headGroupSpec"], 1)]
        groups += [(group, group["replicas"]) for group in spec["workerGroupSpecs"]]
        for group, _ in groups:
            group["template"]["spec"]["containers"][0]["env"] += token
        name = cluster["metadata"]["name"]
        made = [cls(name, group["template"], replicas) for group, replicas in groups]
        for workload in made:
            workload.name += f"-{workload.component}"
        return made
