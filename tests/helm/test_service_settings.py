"""The service, its clients and its CLI understand what the chart gives them."""

import hashlib
import json
import ssl
from contextlib import suppress
from pathlib import Path

import pytest
import typer
import yaml

from kvstore_client.settings import settings_by_name
from kvstore_service.cli.app import app
from kvstore_service.embedded import EmbeddedCluster
from kvstore_service.identity.caller import Scope
from kvstore_service.identity.credential import token_id
from kvstore_service.identity.document import read_document
from kvstore_service.settings import load_settings
from tests.helm.chart import CI_VALUES, Manifests, ci_values, render, values_of, with_value

MANIFESTS = render()

each = pytest.mark.parametrize("path", CI_VALUES, ids=lambda path: path.stem)


def serve_yaml(manifests: Manifests) -> str:
    text: str = manifests["ConfigMap", "kv-kvstore-serve"]["data"]["serve.yaml"]
    return text


@each
def test_the_service_reads_its_settings(path: Path, tmp_path: Path) -> None:
    values = values_of(path)
    file = tmp_path / "serve.yaml"
    file.write_text(serve_yaml(render(values)))
    settings = load_settings(file)
    memory = values.get("storage", {}).get("memory", "4Gi")
    assert settings.memory.human_readable().replace(".0", "") == f"{memory}B"
    assert str(settings.ray_address) == "kv-kvstore-head:6379"


def test_settings_of_production() -> None:
    settings = yaml.safe_load(serve_yaml(render(ci_values("production"))))
    assert settings == {
        "ray_address": "kv-kvstore-head:6379",
        "ray_join": True,
        "keep_nodes": True,
        "listen": "0.0.0.0:7420",
        "metrics_port": 9400,
        "events": "0.0.0.0:7430",
        "storage_port": 7421,
        "memory": "64GiB",
        "disk": "1800GiB",
        "data_dir": "/var/lib/kvstore",
        "durability": "durable",
        "policy": "value",
        "replicas": 2,
        "repair_bandwidth": "100MiB",
        "insecure": False,
        "credentials": "/etc/kvstore/credentials/credentials.json",
        "node_token_file": "/etc/kvstore/node/token",
        "tls_cert": "/etc/kvstore/tls/tls.crt",
        "tls_key": "/etc/kvstore/tls/tls.key",
        "tls_ca": "/etc/kvstore/tls/ca.crt",
        "tls_name": "kv-kvstore.llm.svc",
        "tls_client_ca": "/etc/kvstore/tls/ca.crt",
        "encryption_key_file": "/etc/kvstore/encryption/keys",
        "otlp_endpoint": "grpc://collector.monitoring:4317",
        "log_format": "json",
        "log_level": "info",
        "metrics_tenants": 16,
        "experiments": False,
    }


def test_settings_of_a_laptop_have_neither_disk_nor_credentials() -> None:
    settings = yaml.safe_load(serve_yaml(render(ci_values("laptop"))))
    assert settings["insecure"] is True
    assert settings["durability"] == "memory"
    assert not settings.keys() & {"disk", "credentials", "node_token_file", "tls_cert", "tls_name"}


def test_credentials_are_the_digests_of_the_tokens() -> None:
    manifests = render({"auth": {"tenant": "acme"}})
    read = {
        credential.name: credential
        for credential in read_document(manifests.secret("kv-kvstore-auth", "credentials.json"))
    }
    assert {name: (entry.tenant, *entry.scopes) for name, entry in read.items()} == {
        "admin": (None, Scope.ADMIN),
        "worker": ("acme", Scope.DATA),
        "metrics": (None, Scope.METRICS),
    }
    for name, credential in read.items():
        token = manifests.secret("kv-kvstore-auth", f"{name}-token")
        assert credential.token_digest == hashlib.sha256(token.encode()).digest()
        assert credential.id == token_id(token)


def test_tokens_of_the_user_are_used() -> None:
    token = "kvs_0123456789abcdef_" + "t" * 32
    manifests = render({"auth": {"tokens": {"worker": token}}})
    assert manifests.secret("kv-kvstore-auth", "worker-token") == token
    credentials = read_document(manifests.secret("kv-kvstore-auth", "credentials.json"))
    assert hashlib.sha256(token.encode()).digest() in {entry.token_digest for entry in credentials}


@pytest.mark.parametrize(
    "host", ["kv-kvstore.llm.svc", "kv-kvstore", "kv-kvstore-gateway.llm.svc.cluster.local"]
)
def test_clients_trust_the_certificate(host: str, tmp_path: Path) -> None:
    for name in ("tls.crt", "tls.key", "ca.crt"):
        (tmp_path / name).write_text(MANIFESTS.secret("kv-kvstore-tls", name))
    server_side = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server_side.load_cert_chain(tmp_path / "tls.crt", tmp_path / "tls.key")
    client_side = ssl.create_default_context(cafile=tmp_path / "ca.crt")
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = server_side.wrap_bio(to_server, to_client, server_side=True)
    client = client_side.wrap_bio(to_client, to_server, server_hostname=host)
    for end in (client, server, client):
        with suppress(ssl.SSLWantReadError):
            end.do_handshake()
    assert client.version() == "TLSv1.3"


def test_two_releases_have_different_secrets() -> None:
    first, second = render(), render()
    for name in ("kv-kvstore-auth", "kv-kvstore-ray", "kv-kvstore-redis", "kv-kvstore-tls"):
        both = first["Secret", name]["data"], second["Secret", name]["data"]
        assert not set(both[0].values()) & set(both[1].values()), name


@each
def test_workers_know_the_settings_that_they_are_given(path: Path) -> None:
    manifests = render(values_of(path))
    environment = manifests["ConfigMap", "kv-kvstore-client"]["data"]
    known = settings_by_name()
    assert {name.removeprefix("KVSTORE_").lower() for name in environment} <= known.keys()
    connector = json.loads(manifests["ConfigMap", "kv-kvstore-vllm"]["data"]["kv-transfer-config.json"])
    assert connector["kv_connector_extra_config"].keys() <= known.keys()


def test_workers_find_the_service_with_their_token() -> None:
    settings = {"fetch_policy": "fixed", "lookup_timeout_s": 2}
    manifests = render({"clients": {"mountPath": "/kv", "settings": settings}})
    assert manifests["ConfigMap", "kv-kvstore-client"]["data"] == {
        "KVSTORE_ADDRESS": "kv-kvstore.llm.svc:7420",
        "KVSTORE_TOKEN_FILE": "/kv/token",
        "KVSTORE_TLS_CA": "/kv/ca.crt",
        "KVSTORE_TLS_NAME": "kv-kvstore.llm.svc",
        "KVSTORE_FETCH_POLICY": "fixed",
        "KVSTORE_LOOKUP_TIMEOUT_S": "2",
    }
    vllm = json.loads(manifests["ConfigMap", "kv-kvstore-vllm"]["data"]["kv-transfer-config.json"])
    assert vllm == {
        "kv_connector": "KVStoreConnector",
        "kv_connector_module_path": "kvstore_client.engines.vllm",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {
            "address": "kv-kvstore.llm.svc:7420",
            "token_file": "/kv/token",
            "tls_ca": "/kv/ca.crt",
            "tls_name": "kv-kvstore.llm.svc",
            "fetch_policy": "fixed",
            "lookup_timeout_s": 2,
        },
    }


def test_pods_call_commands_that_exist() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    options = {name: {text for p in command.params for text in p.opts} for name, command in commands.items()}
    manifests = render()
    assert manifests.container("gateway")["command"][:3] == ["kvstore", "serve", "--config"]
    assert {"--config"} <= options["serve"]
    drain = manifests.container("storage")["lifecycle"]["preStop"]["exec"]["command"][-1]
    assert drain.splitlines()[-1] == 'timeout 1800 kvstore drain "$POD_NAME" --wait || true'
    assert "kvstore drain --beyond 3 --wait" in manifests.container("drain")["args"][0]
    assert {"--wait", "--beyond"} <= options["drain"]
    assert {"probe", "status", "selftest"} <= options.keys()
    for command in ("kvstore probe", "kvstore status --json", "kvstore selftest"):
        assert command in manifests.container("test")["args"][0]


def test_probes_of_a_port_with_tls_run_the_cli_and_others_are_kubernetes_own() -> None:
    for component, port in (("storage", 7421), ("gateway", 7420)):
        secured, plain = (
            {name: probe for name, probe in container.items() if name.endswith("Probe")}
            for container in (
                render().container(component),
                render(with_value("tls.source", "disabled", {"insecure": True})).container(component),
            )
        )
        assert secured.keys() == plain.keys() == {"startupProbe", "readinessProbe", "livenessProbe"}
        for probe in secured.values():
            assert probe["exec"]["command"] == ["/bin/sh", "-c", f'exec kvstore probe "$POD_IP:{port}"']
        for probe in plain.values():
            assert probe["grpc"] == {"port": port, "service": ""}


@each
def test_the_gateway_needs_no_memory_of_nodes(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nodes have more memory than the limit of the gateway's container."""
    monkeypatch.setattr("kvstore_cluster.arena._container_limit_bytes", lambda: 1 << 30)
    settings = yaml.safe_load(serve_yaml(render(values_of(path))))
    files = {name: value for name, value in settings.items() if str(value).startswith("/etc/")}
    plain = {name: value for name, value in settings.items() if name not in {*files, "tls_name"}}
    EmbeddedCluster(load_settings(**plain | {"insecure": True, "listen": "127.0.0.1:0"}))
