"""Arbitrary values of the chart: good ones, bad ones, and values that no schema should let through."""

from typing import Any

from hypothesis import strategies as st

from tests.helm.chart import CI_VALUES, Values, defaults, values_of, with_value

_TOKEN = "kvs_0123456789abcdef_" + "t" * 32
_SPREAD = {"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "DoNotSchedule"}
_POD_RESOURCES: list[Any] = [
    {"limits": {"memory": "64Gi", "nvidia.com/gpu": 1}},
    {"limits": {"memory": "2.5Gi"}, "requests": {"cpu": "250m"}},
    {"limits": {"memory": "17179869184"}, "requests": {"cpu": 2}},
    {"limits": {"memory": "4Gi", "cpu": "1500m"}, "requests": {"cpu": "2", "memory": "3Gi"}},
]
_MAP = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "{{ .Release.Name }}-a"}}
_TEXT = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: b}"
_VARIABLE = {"name": "A", "value": "1"}
_MOUNT = {"name": "a", "mountPath": "/a"}

Choices = tuple[list[Any], list[Any]]
"""Values that may be right, and values that are wrong, of all paths that end with a name."""

_SIZES: Choices = (["1Mi", "256Mi", "4Gi", "100Gi", "2Ti"], ["4GB", "1.5Gi", "0Gi", "4"])
_COUNTS: Choices = ([1, 2, 3, 5, 64], [257, "2", 1.5])
_NAMES: Choices = (["", "name", "a.b"], ["Name", "-a", "a" * 254])
_LABELS: Choices = (
    [{"a": "b"}, {"example.com/a": ""}, {"a.b/c_d": "e.f"}],
    [{"a": "b c"}, {"app.kubernetes.io/name": "a"}, {"a": 1}, {"a/b/c": "d"}],
)
_BY_NAME: dict[str, Choices] = dict.fromkeys(
    ["labels", "podLabels", "commonLabels", "annotations", "podAnnotations"], _LABELS
) | {
    "mode": (["statefulset", "kuberay"], ["bundled"]),
    "redis.mode": (["bundled", "external", "none"], ["statefulset"]),
    "source": (["selfSigned", "certManager", "existingSecret", "disabled"], [False, "off"]),
    "durability": (["memory", "relaxed", "durable"], ["none"]),
    "policy": (["value", "lru", "s3-fifo"], ["mru"]),
    "antiAffinity": (["soft", "hard", "none"], ["both"]),
    "format": (["text", "json"], ["xml"]),
    "level": (["debug", "info", "warning", "error"], ["loud"]),
    "pullPolicy": (["Always", "Never"], ["Sometimes"]),
    "upgradeStrategy": (["Recreate", "None"], ["Rolling"]),
    "type": (["ClusterIP", "NodePort", "LoadBalancer"], ["ExternalName"]),
    "replicas": _COUNTS,
    "tenants": _COUNTS,
    "timeoutSeconds": ([30, 900], [29, 86401]),
    "size": _SIZES,
    "memory": _SIZES,
    "repairBandwidth": _SIZES,
    "resources": (
        _POD_RESOURCES,
        [{"requests": {"cpu": "much"}}, {"requests": {"cpu": 0.5}}, {"request": {}}],
    ),
    "tolerations": ([[{"key": "a", "operator": "Exists"}], [{}]], [[{"effect": "Never"}], [{"value": 1}]]),
    "affinity": ([{"podAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": []}}], ["none"]),
    "topologySpreadConstraints": ([[_SPREAD], [_SPREAD | {"labelSelector": {}}]], [[{"maxSkew": 1}]]),
    "nodeSelector": ([{"a": "b"}], [{"a": 1}]),
    "accessModes": ([["ReadWriteOnce"], ["ReadWriteOncePod"]], [["Write"], ["ReadWriteOnce"] * 2]),
    "repository": (["registry.example.com:5000/a/b"], ["A", "a b"]),
    "tag": (["1.2.3"], ["latest", "a/b"]),
    "digest": (["sha256:" + "0" * 64], ["sha256:0"]),
    "address": (
        ["redis:6379", "rediss://redis.example.com:6380"],
        ["redis", "redis:99999", "http://redis:1"],
    ),
    "passwordKey": (["", "other.key"], ["a b"]),
    "otlpEndpoint": (["grpc://a:4317", "http://a.b:4318/v1/traces"], ["a:4317", "grpc://a"]),
    "issuerRef": ([{"name": "a"}, {"name": "a", "kind": "ClusterIssuer"}], [{"name": "a", "x": 1}]),
    "parentRefs": ([[{"name": "a"}]], [[{"namespace": "b"}]]),
    "hostnames": ([["a.example.com"], ["*.example.com"]], [["*"], [1]]),
    "duration": (["90m", "2160h"], ["3 days"]),
    "renewBefore": (["30m"], [30]),
    "interval": (["15s", "1m"], ["often"]),
    "rayVersion": (["2.52.0"], ["2.60", 2.6]),
    "tokens": ([{"worker": _TOKEN}, {"node": _TOKEN}], [{"worker": "short"}, {"other": _TOKEN}]),
    "tenant": (["acme", "a b", ""], ["*", "ü"]),
    "mountPath": (["/a/b"], ["a", "/"]),
    "settings": ([{"encoding": "medium-klt-pco"}, {"lookup_timeout_s": 2}], [{"address": "a:1"}, {"a-b": 1}]),
    "nameOverride": (["cache", "1"], ["a.b"]),
    "fullnameOverride": (["cache", "a" * 40], ["a" * 41, "1a"]),
    "clusterDomain": (["example.org"], ["a..b"]),
    "extraEnv": ([[_VARIABLE]], [[{"name": "POD_IP"}], [{"value": "1"}], [_VARIABLE] * 2]),
    "extraEnvFrom": ([[{"secretRef": {"name": "a"}}]], [[{}]]),
    "extraVolumes": (
        [[{"name": "a", "emptyDir": {}}]],
        [[{"name": "tls", "emptyDir": {}}], [{"emptyDir": {}}]],
    ),
    "extraVolumeMounts": ([[_MOUNT]], [[{"name": "a"}], [{"name": "a", "mountPath": "/etc/kvstore/tls"}]]),
    "extraObjects": ([[_MAP], [_TEXT], [_MAP, _TEXT]], [[1]]),
    "clients": ([[{"namespaceSelector": {}}], [{"ipBlock": {"cidr": "10.0.0.0/8"}}]], [["10.0.0.0/8"], [{}]]),
    "extraEgress": ([[{"to": [{"ipBlock": {"cidr": "10.0.0.0/8"}}]}]], [[{}]]),
    "imagePullSecrets": ([[{"name": "a"}]], [["a"]]),
}

_WRONG: list[Any] = [None, 0, -1, 1.5, True, "", "x" * 300, "a b", "{{ .Values }}", "\n", [], {}]
"""Wrong for most paths, and right for some."""


def leaves(values: Values, prefix: str = "") -> list[str]:
    found: list[str] = []
    for key, value in values.items():
        inner = isinstance(value, dict) and value and key not in ("resources", "labels")
        found += leaves(value, f"{prefix}{key}.") if inner else [prefix + key]
    return found


PATHS = leaves(defaults())
"""Paths of all values, so that a new one is drawn without further ado."""


def _value_at(path: str) -> st.SearchStrategy[Any]:
    name = "clients" if path in ("networkPolicy.metrics", "networkPolicy.redis") else path.rpartition(".")[2]
    switches: Choices = ([True, False], ["yes"])
    names = _NAMES if name.endswith(("Secret", "Name", "name")) else switches
    right, wrong = _BY_NAME.get(path) or _BY_NAME.get(name, names)
    kinds = st.sampled_from([right] * 28 + [wrong, _WRONG])
    return kinds.flatmap(st.sampled_from)


_COMPANIONS: list[tuple[str, Any, dict[str, Any]]] = [
    ("tls.source", "disabled", {"insecure": True, "tls.requireClientCertificate": False}),
    ("tls.source", "existingSecret", {"tls.existingSecret": "a"}),
    ("tls.source", "certManager", {"tls.certManager.issuerRef": {"name": "a"}}),
    ("auth.enabled", False, {"insecure": True}),
    ("redis.mode", "none", {"gateway.persistence.enabled": True}),
    (
        "redis.mode",
        "external",
        {"redis.external.address": "redis:6379", "redis.external.existingSecret": "a"},
    ),
    ("storage.replicas", 1, {"chunks.replicas": 1}),
    ("grpcRoute.enabled", True, {"grpcRoute.parentRefs": [{"name": "a"}]}),
    ("extraVolumeMounts", [_MOUNT], {"extraVolumes": [{"name": "a", "emptyDir": {}}]}),
]
"""Values that others need."""


@st.composite
def value_sets(draw: st.DrawFn) -> tuple[Values, list[str]]:
    """Values, and the paths of those that differ from an example's."""
    values = values_of(draw(st.sampled_from(CI_VALUES)))
    changed = draw(st.lists(st.sampled_from(PATHS), unique=True, max_size=6))
    if draw(st.sampled_from([False] * 30 + [True])):
        parent = draw(st.sampled_from(["", "storage.", "tls.certManager.", "redis.bundled."]))
        changed.append(f"{parent}misspelt")
    alone = draw(st.sampled_from([False, False, True]))
    for path in list(changed):
        value = draw(_value_at(path))
        values = with_value(path, value, values)
        for cause, needed, companions in _COMPANIONS:
            if (path, value) == (cause, needed) and not alone:
                changed += companions
                for other, companion in companions.items():
                    values = with_value(other, companion, values)
    return values, changed
