"""What Kubernetes and the operators accept whose objects the chart makes. Fields that they do not know are mistakes."""

import gzip
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator
from kubernetes_validate.utils import schema_contents
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT202012

from tests.helm.chart import Manifest

NEWEST, OLDEST = "v1.37.0", "v1.29.0"
"""Releases of Kubernetes. The chart admits none before the oldest."""

_RAY_CLUSTER = Path(__file__).parents[1] / "data" / "kuberay" / "ray.io_rayclusters.yaml.gz"

TEXT: dict[str, Any] = {"type": "string", "minLength": 1}
_LABELS = {"type": "object", "additionalProperties": {"type": "string"}}
_SECRET_KEY = {"type": "object", "required": ["name", "key"], "properties": {"name": TEXT, "key": TEXT}}
_FROM_SECRET = {"type": "object", "required": ["secret"], "properties": {"secret": _SECRET_KEY}}
_SERVICE_MONITOR = {
    "required": ["selector", "endpoints"],
    "properties": {
        "selector": {"type": "object", "properties": {"matchLabels": _LABELS}},
        "endpoints": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "port": TEXT,
                    "interval": {"type": "string", "pattern": "^([0-9]+(ms|s|m|h))+$"},
                    "scheme": {"enum": ["http", "https"]},
                    "authorization": {"type": "object", "properties": {"credentials": _SECRET_KEY}},
                    "tlsConfig": {
                        "type": "object",
                        "properties": {
                            "serverName": TEXT,
                            "ca": _FROM_SECRET,
                            "cert": _FROM_SECRET,
                            "keySecret": _SECRET_KEY,
                        },
                    },
                },
            },
        },
    },
}
_RULE = {
    "type": "object",
    "required": ["alert", "expr"],
    "properties": {"alert": TEXT, "expr": TEXT, "for": TEXT, "labels": _LABELS, "annotations": _LABELS},
}
_GROUP = {
    "type": "object",
    "required": ["name"],
    "properties": {"name": TEXT, "rules": {"type": "array", "items": _RULE}},
}
_CERTIFICATE = {
    "required": ["secretName", "issuerRef"],
    "properties": {
        "secretName": TEXT,
        "duration": TEXT,
        "renewBefore": TEXT,
        "issuerRef": {
            "type": "object",
            "required": ["name"],
            "properties": {"name": TEXT, "kind": TEXT, "group": TEXT},
        },
        "usages": {"type": "array", "items": {"enum": ["server auth", "client auth"]}},
        "privateKey": {
            "type": "object",
            "properties": {
                "algorithm": {"enum": ["RSA", "ECDSA", "Ed25519"]},
                "size": {"type": "integer"},
                "rotationPolicy": {"enum": ["Never", "Always"]},
            },
        },
        "ipAddresses": {"type": "array", "items": TEXT},
        "dnsNames": {"type": "array", "items": TEXT},
    },
}
_BACKEND = {
    "type": "object",
    "required": ["name"],
    "properties": {"name": TEXT, "port": {"type": "integer", "minimum": 1, "maximum": 65535}},
}
_ROUTE_RULE = {"type": "object", "properties": {"backendRefs": {"type": "array", "items": _BACKEND}}}
_PARENT = {
    "type": "object",
    "required": ["name"],
    "properties": {"name": TEXT, "namespace": TEXT, "sectionName": TEXT},
}
_GRPC_ROUTE = {
    "properties": {
        "parentRefs": {"type": "array", "items": _PARENT},
        "hostnames": {"type": "array", "items": TEXT},
        "rules": {"type": "array", "items": _ROUTE_RULE},
    }
}
_OPERATORS: dict[tuple[str, str], dict[str, Any]] = {
    ("monitoring.coreos.com/v1", "ServiceMonitor"): _SERVICE_MONITOR,
    ("monitoring.coreos.com/v1", "PrometheusRule"): {
        "required": ["groups"],
        "properties": {"groups": {"type": "array", "items": _GROUP}},
    },
    ("cert-manager.io/v1", "Certificate"): _CERTIFICATE,
    ("gateway.networking.k8s.io/v1", "GRPCRoute"): _GRPC_ROUTE,
}
"""Specs of these objects: the part of their definitions that the chart uses."""


def faults(manifest: Manifest, kubernetes: str = NEWEST) -> list[str]:
    """What makes the manifest unacceptable. A kind that nobody here knows is a fault, too."""
    validator = _validator(manifest["apiVersion"], manifest["kind"], kubernetes)
    name = f"{manifest['kind']} {manifest['metadata']['name']}"
    return [f"{name}{error.json_path[1:]}: {error.message}" for error in validator.iter_errors(manifest)]


@cache
def _validator(api_version: str, kind: str, kubernetes: str) -> Draft202012Validator:
    if (api_version, kind) == ("ray.io/v1", "RayCluster"):
        return Draft202012Validator(_closed(_ray_cluster()))
    if operator := _OPERATORS.get((api_version, kind)):
        spec = {"type": "object", **operator}
        return Draft202012Validator(_closed({"properties": {**_ENVELOPE, "spec": spec}}))
    group, _, version = api_version.rpartition("/")
    prefix = f"{group.partition('.')[0]}-" if group else ""
    folder = f"kubernetes-json-schema/{kubernetes}-local-strict"
    registry: Registry[Any] = _definitions(folder)
    schema = schema_contents(f"{folder}/{kind.lower()}-{prefix}{version}.json", kubernetes)
    return Draft202012Validator(schema, registry=registry)


_ENVELOPE = {
    "apiVersion": TEXT,
    "kind": TEXT,
    "metadata": {
        "type": "object",
        "properties": {"name": TEXT, "namespace": TEXT, "labels": _LABELS, "annotations": {"type": "object"}},
    },
}


@cache
def _definitions(folder: str) -> Registry[Any]:
    contents = schema_contents(f"{folder}/_definitions.json", folder)
    resource = Resource.from_contents(contents, default_specification=DRAFT202012)
    registry: Registry[Any] = Registry().with_resource("_definitions.json", resource)
    return registry.crawl()  # once, not for every manifest


def _ray_cluster() -> dict[str, Any]:
    definition = yaml.load(gzip.decompress(_RAY_CLUSTER.read_bytes()), yaml.CSafeLoader)
    (version,) = (version for version in definition["spec"]["versions"] if version["name"] == "v1")
    schema: dict[str, Any] = version["schema"]["openAPIV3Schema"]
    schema["properties"]["metadata"] = _ENVELOPE["metadata"]
    return schema


def _closed(schema: Any) -> Any:
    """The schema without room for properties that it does not name. Kubernetes would drop these without a word."""
    if isinstance(schema, list):
        return [_closed(inner) for inner in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _closed(inner) for key, inner in schema.items()}
    if isinstance(schema.get("properties"), dict) and "additionalProperties" not in schema:
        closed["additionalProperties"] = False
    return closed
