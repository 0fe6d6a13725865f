"""What single values change."""

from typing import Any

import pytest

from tests.helm import consistency, schemas
from tests.helm.chart import Manifests, Values, ci_values, render, with_value

KUBERAY: Values = {"mode": "kuberay"}


def environment(container: dict[str, Any]) -> dict[str, Any]:
    return {entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in container["env"]}


def test_both_modes_run_the_same_pods() -> None:
    """Apart from what the operator adds itself."""
    plain, operated = render(), render(KUBERAY)
    for component in ("head", "storage", "gateway"):
        ours, theirs = plain.container(component), operated.container(component)
        added = {"RAY_REDIS_ADDRESS", "RAY_external_storage_namespace"} if component == "head" else set()
        assert environment(ours).keys() - environment(theirs).keys() == added
        assert {**ours, "env": None} == {**theirs, "env": None}


def test_kuberay_makes_one_cluster() -> None:
    manifests = render(KUBERAY)
    assert {manifest["metadata"]["name"] for manifest in manifests.of("StatefulSet")} == {"kv-kvstore-redis"}
    cluster = manifests["RayCluster", "kv-kvstore"]
    assert cluster["metadata"]["annotations"] == {"ray.io/overwrite-container-cmd": "true"}
    spec = cluster["spec"]
    assert spec["authOptions"] == {"mode": "token", "secretName": "kv-kvstore-ray"}
    assert spec["gcsFaultToleranceOptions"] == {
        "redisAddress": "kv-kvstore-redis:6379",
        "externalStorageNamespace": "llm-kv-kvstore",
        "redisPassword": {"valueFrom": {"secretKeyRef": {"name": "kv-kvstore-redis", "key": "password"}}},
    }
    assert spec["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}
    (group,) = spec["workerGroupSpecs"]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (3, 3, 3)
    (disk,) = (volume for volume in group["template"]["spec"]["volumes"] if volume["name"] == "storage")
    assert disk["ephemeral"]["volumeClaimTemplate"]["spec"]["resources"] == {"requests": {"storage": "100Gi"}}


def test_kuberay_keeps_rays_state_in_rocksdb() -> None:
    manifests = render(ci_values("kuberay"))
    spec = manifests["RayCluster", "kv-kvstore"]["spec"]
    assert spec["gcsFaultToleranceOptions"] == {"backend": "rocksdb", "storage": {"size": "2Gi"}}
    assert "--redis-password=$(RAY_REDIS_PASSWORD)" not in manifests.container("head")["command"]


@pytest.mark.parametrize("values", [{}, KUBERAY])
def test_ray_gets_redis_password_as_an_option(values: Values) -> None:
    """Ray 2.60 aborts when the password is in a variable only."""
    head = render(values).container("head")
    assert "--redis-password=$(RAY_REDIS_PASSWORD)" in head["command"]
    assert environment(head)["RAY_REDIS_PASSWORD"]["secretKeyRef"]["name"] == "kv-kvstore-redis"


def test_an_external_redis_needs_no_password() -> None:
    external = {"address": "redis:6379", "existingSecret": "mine", "passwordKey": ""}
    manifests = render({"redis": {"mode": "external", "external": external}})
    assert not any("redis-password" in word for word in manifests.container("head")["command"])
    assert "RAY_REDIS_PASSWORD" not in environment(manifests.container("head"))
    url = environment(manifests.container("gateway"))["KVSTORE_REDIS"]
    assert url == {"secretKeyRef": {"name": "mine", "key": "url"}}


def test_without_redis_the_catalogue_is_on_a_volume() -> None:
    manifests = render({"redis": {"mode": "none"}, "gateway": {"persistence": {"enabled": True}}})
    assert ("PersistentVolumeClaim", "kv-kvstore-gateway") in manifests
    assert "KVSTORE_REDIS" not in environment(manifests.container("gateway"))
    assert not [manifest for manifest in manifests if "redis" in manifest["metadata"]["name"]]


@pytest.mark.parametrize(("memory", "limit"), [("512Mi", "1536Mi"), ("4Gi", "5120Mi"), ("2Ti", "2098176Mi")])
def test_memory_of_a_storage_pod_follows_from_its_dram(memory: str, limit: str) -> None:
    container = render({"storage": {"memory": memory}}).container("storage")
    assert container["resources"] == {"requests": {"cpu": "1", "memory": limit}, "limits": {"memory": limit}}


def test_given_resources_win_over_computed_ones() -> None:
    given = {"requests": {"cpu": 8}, "limits": {"memory": "6Gi"}}
    resources = render({"storage": {"resources": given}}).container("storage")["resources"]
    assert resources == {"requests": {"cpu": 8, "memory": "5120Mi"}, "limits": {"memory": "6Gi"}}


@pytest.mark.parametrize(("replicas", "available"), [(1, None), (2, 1), (5, 4)])
def test_a_disruption_budget_needs_two_nodes(replicas: int, available: int | None) -> None:
    budgets = render({"storage": {"replicas": replicas}, "chunks": {"replicas": 1}}).of("PodDisruptionBudget")
    assert [budget["spec"]["minAvailable"] for budget in budgets] == ([available] if available else [])


def test_the_grace_period_outlasts_the_drain() -> None:
    drained = render({"storage": {"drain": {"timeoutSeconds": 100}}})
    assert drained.pod("storage")["spec"]["terminationGracePeriodSeconds"] == 220
    assert drained["Job", "kv-kvstore-drain"]["spec"]["activeDeadlineSeconds"] == 220
    plain = render({"storage": {"drain": {"enabled": False}}})
    assert "lifecycle" not in plain.container("storage")
    assert ("Job", "kv-kvstore-drain") not in plain
    assert ("Job", "kv-kvstore-drain") not in render(KUBERAY)


@pytest.mark.parametrize(
    ("kind", "rule"),
    [
        ("soft", "preferredDuringSchedulingIgnoredDuringExecution"),
        ("hard", "requiredDuringSchedulingIgnoredDuringExecution"),
        ("none", None),
    ],
)
def test_storage_nodes_avoid_one_another(kind: str, rule: str | None) -> None:
    spec = render({"storage": {"antiAffinity": kind}}).pod("storage")["spec"]
    assert list(spec.get("affinity", {}).get("podAntiAffinity", {})) == ([rule] if rule else [])


def test_affinity_of_the_user_replaces_it() -> None:
    spec = render(ci_values("gpu-encode")).pod("storage")["spec"]
    assert spec["affinity"] == ci_values("gpu-encode")["storage"]["affinity"]


def test_spread_of_the_user_keeps_its_selector() -> None:
    own = {"maxSkew": 1, "topologyKey": "rack", "whenUnsatisfiable": "DoNotSchedule", "labelSelector": {}}
    own["labelSelector"] = {"matchLabels": {"a": "b"}}
    spec = render({"storage": {"topologySpreadConstraints": [own]}}).pod("storage")["spec"]
    assert spec["topologySpreadConstraints"] == [own]


def test_a_plain_grpc_port_names_its_protocol() -> None:
    def protocols(manifests: Manifests) -> set[str | None]:
        services = (manifests["Service", name] for name in ("kv-kvstore", "kv-kvstore-gateway"))
        return {
            port.get("appProtocol")
            for service in services
            for port in service["spec"]["ports"]
            if port["name"] == "grpc"
        }

    assert protocols(render(ci_values("laptop"))) == {"kubernetes.io/h2c"}
    assert protocols(render()) == {None}


def test_ports_of_the_gateway() -> None:
    def ports(values: Values) -> list[int]:
        return [port["port"] for port in render(values)["Service", "kv-kvstore"]["spec"]["ports"]]

    assert ports({"events": {"enabled": True}}) == [7420, 9400, 7430, 7431]
    assert ports({"metrics": {"enabled": False}}) == [7420]


def test_headless_services_find_pods_before_they_are_ready_but_the_gateway() -> None:
    for component, early in (("head", True), ("storage", True), ("gateway", False)):
        spec = render()["Service", f"kv-kvstore-{component}"]["spec"]
        assert (spec["clusterIP"], spec["publishNotReadyAddresses"]) == ("None", early)


def test_the_network_policy_admits_callers_by_port() -> None:
    spec = render(ci_values("production"))["NetworkPolicy", "kv-kvstore"]["spec"]
    own, clients, metrics = spec["ingress"]
    assert own == {"from": [{"podSelector": spec["podSelector"]}]}
    assert [port["port"] for port in clients["ports"]] == [7420, 7421, 7422, 7430, 7431]
    assert [port["port"] for port in metrics["ports"]] == [9400]
    own, dns, redis, collector = spec["egress"]
    assert own == {"to": [{"podSelector": spec["podSelector"]}]}
    assert {(port["port"], port["protocol"]) for port in dns["ports"]} == {(53, "UDP"), (53, "TCP")}
    assert redis["ports"] == [{"port": 6380}]
    assert collector == ci_values("production")["networkPolicy"]["extraEgress"][0]


def test_prometheus_shows_token_and_certificate() -> None:
    (endpoint,) = render(ci_values("production"))["ServiceMonitor", "kv-kvstore"]["spec"]["endpoints"]
    assert endpoint["authorization"]["credentials"] == {"name": "kvstore-tokens", "key": "metrics-token"}
    assert endpoint["scheme"] == "https"
    assert endpoint["tlsConfig"].keys() == {"serverName", "ca", "cert", "keySecret"}


def test_names_follow_the_release() -> None:
    assert ("Service", "my-kvstore") in render(name="my-kvstore")
    assert ("Service", "a-cache") in render({"nameOverride": "cache"}, name="a")
    assert ("Service", "b") in render({"fullnameOverride": "b"}, name="a")


def test_additions_of_the_user_reach_every_pod_of_the_service() -> None:
    values: Values = {
        "extraEnv": [{"name": "A", "value": "1"}],
        "extraEnvFrom": [{"configMapRef": {"name": "more"}}],
        "extraVolumes": [{"name": "more", "emptyDir": {}}],
        "extraVolumeMounts": [{"name": "more", "mountPath": "/more"}],
        "imagePullSecrets": [{"name": "registry"}],
        "commonLabels": {"team": "a"},
        "extraObjects": [
            {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "{{ .Release.Name }}-map"}},
            "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: text, labels: {team: a}}",
        ],
    }
    for mode in ("statefulset", "kuberay"):
        manifests = render(values | {"mode": mode})
        assert consistency.faults(manifests) == []
        assert [fault for manifest in manifests for fault in schemas.faults(manifest)] == []
        for component in ("head", "storage", "gateway"):
            container, pod = manifests.container(component), manifests.pod(component)
            assert environment(container)["A"] == "1"
            assert container["envFrom"] == values["extraEnvFrom"]
            assert {"name": "more", "mountPath": "/more"} in container["volumeMounts"]
            assert pod["spec"]["imagePullSecrets"] == [{"name": "registry"}]
            assert pod["metadata"]["labels"]["team"] == "a"
        assert ("ConfigMap", "kv-map") in manifests
        assert ("ConfigMap", "text") in manifests
        labels = [manifest["metadata"].get("labels", {"team": "a"}) for manifest in manifests]
        assert {label.get("team") for label in labels} == {"a"}


@pytest.mark.parametrize("component", ["head", "storage", "gateway", "redis"])
def test_each_component_has_values_of_its_pod(component: str) -> None:
    path = "redis.bundled" if component == "redis" else component
    pod: Values = {
        "nodeSelector": {"pool": "a"},
        "tolerations": [{"key": "a", "operator": "Exists"}],
        "priorityClassName": "high",
    }
    values = with_value(f"{path}.podAnnotations", {"note": "b"})
    values = with_value(f"{path}.podLabels", {"team": "c"}, values)
    for key, value in pod.items():
        values = with_value(f"{path}.{key}", value, values)
    rendered = render(values).pod(component)
    assert pod.items() <= rendered["spec"].items()
    assert rendered["metadata"]["annotations"]["note"] == "b"
    assert rendered["metadata"]["labels"]["team"] == "c"


def test_a_digest_wins_over_a_tag() -> None:
    def image(**values: str) -> str:
        text: str = render({"image": values}).container("gateway")["image"]
        return text

    digest = "sha256:" + "0" * 64
    assert image(digest=digest, tag="1") == f"kvstore@{digest}"
    assert image(tag="1") == "kvstore:1"
    assert image() == "kvstore:0.1.0"
