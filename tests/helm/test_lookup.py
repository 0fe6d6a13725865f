"""What the chart makes of what is in the cluster: secrets stay as they are, and nodes are drained before they go."""

import base64
import json
from collections.abc import Iterable

import pytest
from cryptography import x509
from helm_python import _native
from helm_python.chart import Chart
from helm_python.config import Config

from tests.helm.api_server import ApiServer
from tests.helm.chart import CHART, Manifest, Manifests, Values, render

GENERATED = ["kv-kvstore-auth", "kv-kvstore-ray", "kv-kvstore-redis", "kv-kvstore-tls"]


def render_beside(existing: Iterable[Manifest], values: Values | None = None) -> Manifests:
    """Renders the chart for a cluster with these objects. The package has no public function for that yet."""
    with (
        ApiServer(existing) as server,
        Config(kubeconfig_content=server.kubeconfig, namespace="llm", storage_driver="memory") as config,
        Chart.load(CHART) as chart,
    ):
        options = json.dumps({"name": "kv", "namespace": "llm", "is_upgrade": True})
        texts: dict[str, str] = json.loads(
            _native.call_string(
                "helm_render_with_config", config._raw(), chart._raw(), json.dumps(values or {}), options
            )
        )
    return Manifests({path: text for path, text in texts.items() if not path.endswith("NOTES.txt")})


def secrets(manifests: Manifests) -> dict[str, dict[str, str]]:
    return {secret["metadata"]["name"]: secret["data"] for secret in manifests.of("Secret")}


def test_an_upgrade_keeps_all_secrets() -> None:
    installed = render()
    assert secrets(installed).keys() == {*GENERATED}
    upgraded = render_beside(installed.of("Secret"), {"image": {"tag": "9.9.9"}, "storage": {"replicas": 5}})
    assert secrets(upgraded) == secrets(installed)


@pytest.mark.parametrize("name", GENERATED)
def test_a_deleted_secret_is_made_anew_and_the_others_are_kept(name: str) -> None:
    installed = render()
    kept = [secret for secret in installed.of("Secret") if secret["metadata"]["name"] != name]
    before, after = secrets(installed), secrets(render_beside(kept))
    assert {other for other in GENERATED if before[other] != after[other]} == {name}


def test_credentials_follow_the_tenant_and_tokens_stay() -> None:
    installed = render()
    upgraded = render_beside(installed.of("Secret"), {"auth": {"tenant": "acme"}})
    before, after = (secrets(manifests)["kv-kvstore-auth"] for manifests in (installed, upgraded))
    assert {key for key in before if before[key] != after[key]} == {"credentials.json"}
    credentials = json.loads(upgraded.secret("kv-kvstore-auth", "credentials.json"))["credentials"]
    assert {entry["name"]: entry["tenant"] for entry in credentials}["worker"] == "acme"


def test_given_tokens_win_over_those_in_the_cluster() -> None:
    token = "kvs_0123456789abcdef_" + "t" * 32
    upgraded = render_beside(render().of("Secret"), {"auth": {"tokens": {"worker": token}}})
    assert upgraded.secret("kv-kvstore-auth", "worker-token") == token


@pytest.mark.parametrize(("running", "wanted", "drains"), [(5, 3, True), (3, 3, False), (2, 3, False)])
def test_nodes_are_drained_only_before_a_scale_down(running: int, wanted: int, drains: bool) -> None:
    before = render({"storage": {"replicas": running}})["StatefulSet", "kv-kvstore-storage"]
    after = render_beside([before], {"storage": {"replicas": wanted}})
    assert (("Job", "kv-kvstore-drain") in after) == drains
    if drains:
        assert f"--beyond {wanted} --wait" in after.container("drain")["args"][0]


def test_a_certificate_without_the_name_that_clients_ask_for_is_made_anew() -> None:
    installed = render()
    renamed = render_beside(installed.of("Secret"), {"tls": {"name": "kv.example.com"}})
    before, after = secrets(installed), secrets(renamed)
    assert {name for name in GENERATED if before[name] != after[name]} == {"kv-kvstore-tls"}
    certificate = x509.load_pem_x509_certificate(base64.b64decode(after["kv-kvstore-tls"]["tls.crt"]))
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert "kv.example.com" in names.get_values_for_type(x509.DNSName)
