"""An upgrade changes nothing that Kubernetes forbids to change, and restarts pods when it has to.

What Helm looks up in the cluster is tested in test_lookup.py."""

from typing import Any

import pytest

from tests.helm.chart import Manifests, Values, ci_values, render, with_value

CHANGES: dict[str, Values] = {
    "image": {"image": {"repository": "other/kvstore", "tag": "9.9.9"}},
    "memory": {"storage": {"memory": "8Gi"}},
    "replicas": {"storage": {"replicas": 7}},
    "one node": {"storage": {"replicas": 1}, "chunks": {"replicas": 1}},
    "resources": {"storage": {"resources": {"requests": {"cpu": 4}}}, "head": {"resources": {}}},
    "labels": {"commonLabels": {"a": "b"}, "storage": {"podLabels": {"c": "d"}}},
    "annotations": {"storage": {"podAnnotations": {"a": "b"}}},
    "scheduling": {"storage": {"nodeSelector": {"a": "b"}, "antiAffinity": "hard"}},
    "share of the disk": {"storage": {"disk": {"size": "50Gi"}}},
    "certificates": {"tls": {"source": "existingSecret", "existingSecret": "certificate"}},
    "tokens": {"auth": {"existingSecret": "tokens"}},
    "no TLS": {"tls": {"source": "disabled"}, "insecure": True},
    "encryption": {"encryption": {"existingSecret": "keys"}},
    "events": {"events": {"enabled": True}},
    "settings": {"log": {"level": "debug"}, "chunks": {"policy": "lru"}},
    "network": {"networkPolicy": {"enabled": True}},
}


def immutable(manifests: Manifests) -> dict[str, Any]:
    """What Kubernetes refuses to change, by object."""
    found: dict[str, Any] = {}
    for manifest in manifests:
        spec, name = manifest.get("spec", {}), f"{manifest['kind']} {manifest['metadata']['name']}"
        match manifest["kind"]:
            case "StatefulSet":
                allowed = {"replicas", "template", "updateStrategy", "minReadySeconds"}
                found[name] = {key: value for key, value in spec.items() if key not in allowed}
            case "Deployment":
                found[name] = spec["selector"]
            case "Service":
                found[name] = spec.get("clusterIP")
            case "PersistentVolumeClaim":
                found[name] = spec
    return found


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_no_change_of_users_touches_what_cannot_be_changed(change: Values) -> None:
    assert immutable(render(change)) == immutable(render())


def test_a_new_version_of_the_chart_changes_no_claim_and_no_selector() -> None:
    """Labels with the version would."""
    for fixed in immutable(render()).values():
        assert "0.1.0" not in str(fixed)


def checksum(values: Values) -> str:
    text: str = render(values).pod("gateway")["metadata"]["annotations"]["checksum/settings"]
    return text


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("storage.memory", "8Gi"),
        ("chunks.policy", "lru"),
        ("chunks.repairBandwidth", "50Mi"),
        ("log.level", "debug"),
        ("tls.name", "other"),
        ("metrics.tenants", 5),
        ("encryption.existingSecret", "keys"),
        ("tracing.otlpEndpoint", "grpc://collector:4317"),
    ],
)
def test_the_gateway_restarts_for_new_settings(path: str, value: object) -> None:
    assert checksum(with_value(path, value)) != checksum({})


def test_it_does_not_for_what_it_does_not_read() -> None:
    others: Values = {
        "storage": {"replicas": 9},
        "networkPolicy": {"enabled": True},
        "commonLabels": {"a": "b"},
    }
    assert checksum(others) == checksum({})


def test_storage_pods_stay_when_settings_change() -> None:
    """The gateway restarts the nodes within them, one after the other."""
    changed: Values = {"log": {"level": "debug"}, "chunks": {"policy": "lru"}, "metrics": {"tenants": 3}}
    assert render(changed).pod("storage") == render().pod("storage")


def test_templates_without_random_secrets_render_the_same_twice() -> None:
    """Otherwise tools that compare what they render with the cluster would never be done."""
    assert render(ci_values("production")).texts == render(ci_values("production")).texts


def test_hooks_are_the_only_objects_that_are_not_kept() -> None:
    hooks = {
        manifest["kind"]: manifest["metadata"]["annotations"]["helm.sh/hook"]
        for manifest in render()
        if "helm.sh/hook" in manifest["metadata"].get("annotations", {})
    }
    assert hooks == {"Job": "pre-upgrade", "Pod": "test"}
