"""Values that do not work end the rendering, with a sentence that names the value and what to do."""

import re

import pytest

from tests.helm.chart import RefusedError, Values, mentions, render

EXTERNAL: Values = {"mode": "external", "external": {"address": "redis:6379", "existingSecret": "redis"}}
MORE = {"name": "more"}
TOKEN = "kvs_0123456789abcdef_" + "t" * 32

TOGETHER: list[tuple[str, Values]] = [
    ("insecure", {"tls": {"source": "disabled"}}),
    ("insecure", {"auth": {"enabled": False}}),
    ("chunks.replicas", {"chunks": {"replicas": 4}}),
    ("chunks.durability", {"chunks": {"durability": "durable"}, "storage": {"disk": {"enabled": False}}}),
    ("storage.disk.size", {"storage": {"disk": {"size": "101Gi"}}}),
    ("storage.resources.limits.memory", {"storage": {"resources": {"limits": {"memory": "4.5Gi"}}}}),
    ("storage.resources.requests.memory", {"storage": {"resources": {"requests": {"memory": "8Gi"}}}}),
    ("gateway.resources.requests.memory", {"gateway": {"resources": {"requests": {"memory": "3Gi"}}}}),
    ("head.resources.requests.cpu", {"head": {"resources": {"limits": {"cpu": "400m", "memory": "2Gi"}}}}),
    ("redis.external", {"redis": {"external": EXTERNAL["external"]}}),
    ("redis.external.address", {"redis": {"mode": "external", "external": {"existingSecret": "a"}}}),
    ("redis.external.address", {"redis": {"mode": "external", "external": {"address": "redis:65536"}}}),
    ("redis.external.existingSecret", {"redis": {"mode": "external", "external": {"address": "a:1"}}}),
    ("gateway.persistence.enabled", {"redis": {"mode": "none"}}),
    ("auth.tokens", {"auth": {"existingSecret": "a", "tokens": {"worker": TOKEN}}}),
    ("auth.enabled", {"insecure": True, "auth": {"enabled": False, "existingSecret": "a"}}),
    ("tls.existingSecret", {"tls": {"source": "existingSecret"}}),
    ("tls.existingSecret", {"tls": {"existingSecret": "a"}}),
    ("tls.certManager.issuerRef", {"tls": {"source": "certManager"}}),
    ("tls.certManager.issuerRef", {"tls": {"certManager": {"issuerRef": {"name": "a"}}}}),
    ("tls.requireClientCertificate", {"tls": {"requireClientCertificate": True}}),
    ("kuberay.rocksdb.enabled", {"kuberay": {"rocksdb": {"enabled": True}}}),
    ("grpcRoute.parentRefs", {"grpcRoute": {"enabled": True}}),
    ("metrics.serviceMonitor.enabled", {"metrics": {"enabled": False, "serviceMonitor": {"enabled": True}}}),
    ("metrics.prometheusRule.enabled", {"metrics": {"enabled": False, "prometheusRule": {"enabled": True}}}),
    ("extraEnv", {"extraEnv": [{"name": "POD_IP", "value": "::1"}]}),
    ("extraEnv", {"extraEnv": [{"name": "A", "value": "1"}, {"name": "A", "value": "2"}]}),
    ("extraVolumes", {"extraVolumes": [{"name": "tmp", "emptyDir": {}}]}),
    ("extraVolumeMounts", {"extraVolumeMounts": [{"name": "nothing", "mountPath": "/a"}]}),
    (
        "extraVolumeMounts",
        {"extraVolumes": [MORE], "extraVolumeMounts": [MORE | {"mountPath": "/etc/kvstore/tls"}]},
    ),
]

ALONE: list[tuple[str, Values]] = [
    ("mode", {"mode": "helm"}),
    ("misspelt", {"misspelt": 1}),
    ("gateway", {"mode": "kuberay", "gateway": {"replicas": 2}}),
    ("image.tag", {"image": {"tag": "latest"}}),
    ("storage.replicas", {"storage": {"replicas": 0}}),
    ("storage.memory", {"storage": {"memory": "4GB"}}),
    ("storage.memory", {"storage": {"memory": None}}),
    ("storage.resources.limits.memory", {"storage": {"resources": {"limits": {"memory": 8589934592}}}}),
    ("head.resources.requests.cpu", {"head": {"resources": {"requests": {"cpu": 0.5}}}}),
    ("storage.drain.timeoutSeconds", {"storage": {"drain": {"timeoutSeconds": "15m"}}}),
    ("tls.source", {"tls": {"source": False}}),
    ("log.level", {"log": {"level": "loud"}}),
    ("auth.tenant", {"auth": {"tenant": "*"}}),
    ("auth.tokens.worker", {"auth": {"tokens": {"worker": "secret"}}}),
    ("redis.external.address", {"redis": EXTERNAL | {"external": {"address": "redis"}}}),
    ("commonLabels", {"commonLabels": {"app.kubernetes.io/name": "other"}}),
    ("clients.settings", {"clients": {"settings": {"address": "elsewhere:7420"}}}),
    ("fullnameOverride", {"fullnameOverride": "a" * 41}),
    ("fullnameOverride", {"fullnameOverride": "1a"}),
]


@pytest.mark.parametrize(("path", "values"), TOGETHER)
def test_values_that_do_not_fit_together(path: str, values: Values) -> None:
    with pytest.raises(RefusedError, match="these values cannot be used") as refusal:
        render(values)
    sentences = re.findall(r"(?m)^- (\S+): (.{20,})$", str(refusal.value))
    assert path in dict(sentences)


@pytest.mark.parametrize(("path", "values"), ALONE)
def test_values_that_the_schema_refuses(path: str, values: Values) -> None:
    with pytest.raises(RefusedError) as refusal:
        render(values)
    last = path.rpartition(".")[2]
    assert mentions(str(refusal.value), path) or f"'{last}'" in str(refusal.value), str(refusal.value)


def test_all_problems_are_named_at_once() -> None:
    with pytest.raises(RefusedError) as refusal:
        render({"tls": {"source": "disabled"}, "redis": {"mode": "none"}, "chunks": {"replicas": 9}})
    for path in ("insecure", "gateway.persistence.enabled", "chunks.replicas"):
        assert mentions(str(refusal.value), path)


@pytest.mark.parametrize("name", ["1st", "a.b", "a" * 40])
def test_a_name_of_a_release_that_makes_no_names_of_services(name: str) -> None:
    with pytest.raises(RefusedError, match="fullnameOverride: objects would be named"):
        render(name=name)
    assert ("Service", "kv") in render({"fullnameOverride": "kv"}, name=name)
