"""The report that an operator gives to those who help: one archive, without secrets, keys or values."""

import io
import json
import platform
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.json_format import MessageToDict
from prometheus_client import CollectorRegistry, generate_latest

from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_api.v1 import kvstore_pb2_grpc as rpc
from kvstore_codec.errors import KVStoreError
from kvstore_service.admin import ClusterAdmin
from kvstore_service.cluster_stats import (
    background_works,
    cluster_stats,
    environment_connector,
    list_calibrations,
    live_members,
)
from kvstore_service.doctor import examine
from kvstore_service.metrics import ClusterCollector
from kvstore_service.observability.overview import health_of
from kvstore_service.observability.redaction import Redaction, shown_environment
from kvstore_service.settings import effective_settings

PACKAGES = (
    "kvstore-service", "av", "blake3", "grpcio", "numpy", "prometheus-client", "protobuf", "pydantic", "ray", "redis",
    "torch", "transformers", "typer", "vllm", "zstandard",
)  # fmt: skip
_TIMEOUT_S = 5.0
_OPTIONS = [("grpc.max_receive_message_length", 64 << 20)]


def write_report(path: Path, address: str, config: Path | None) -> dict[str, str]:
    """Writes the archive, and returns why parts of it are missing, by the name of the part. A cluster that does not
    answer costs only its own parts. Raises OSError if the archive cannot be written."""
    redaction, missing = Redaction(), dict[str, str]()
    name = path.name.removesuffix(".tgz").removesuffix(".gz").removesuffix(".tar")
    with tarfile.open(path, "x:gz") as archive:

        def add(part: str, text: str) -> None:
            data = redaction.of(text).encode()
            entry = tarfile.TarInfo(f"{name}/{part}")
            entry.size, entry.mtime, entry.mode = len(data), int(time.time()), 0o644
            archive.addfile(entry, io.BytesIO(data))

        for part, make in _parts(address, config):
            try:
                for file, text in make().items():
                    add(file, text)
            except (KVStoreError, grpc.RpcError) as error:
                missing[part] = redaction.of(str(error))
        add("missing.json", _json(missing))
    return missing


def _parts(address: str, config: Path | None) -> Iterator[tuple[str, Callable[[], Mapping[str, str]]]]:
    """Name and maker of each part. A maker returns texts by file name."""
    yield "versions", lambda: {"versions.json": _json(_versions())}
    yield (
        "settings",
        lambda: {
            "settings.json": _json(
                {
                    "of kvstore serve here": [asdict(setting) for setting in effective_settings(config)],
                    "environment": shown_environment(),
                }
            )
        },
    )
    yield "doctor", lambda: {"doctor.json": _json([asdict(check) for check in examine()])}
    yield "cluster", lambda: _cluster(address)
    yield "metrics", lambda: {"metrics.prom": _metrics(address)}
    yield "models", lambda: _models(address)
    yield "logs", lambda: _logs(address)


def _versions() -> dict[str, Any]:
    return {
        "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "python": sys.version,
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cluster(address: str) -> dict[str, str]:
    reply = cluster_stats(address)
    health, sentence = health_of(reply)
    told = {
        "health": health,
        "sentence": sentence,
        "background loops of the coordinator work": background_works(address),
        "stats": MessageToDict(reply, preserving_proto_field_name=True),
    }
    return {"cluster.json": _json(told)}


def _metrics(address: str) -> str:
    registry = CollectorRegistry()
    registry.register(ClusterCollector(lambda: cluster_stats(address)))
    return generate_latest(registry).decode()


def _models(address: str) -> dict[str, str]:
    with ClusterAdmin(address) as cluster:
        models = [MessageToDict(model, preserving_proto_field_name=True) for model in cluster.models()]
        quotas = {quota.tenant: quota.limit_bytes for quota in cluster.quotas()}
    calibrations = [
        {"digest": info.digest.hex(), "model": info.model_digest.hex(), "bytes": info.size_bytes}
        for info in list_calibrations(address)
    ]
    return {"models.json": _json({"models": models, "calibrations": calibrations, "quotas": quotas})}


def _logs(address: str) -> dict[str, str]:
    connector, found = environment_connector(), {}
    with connector.channel(address, _OPTIONS) as channel:
        found["logs/coordinator.jsonl"] = _lines(rpc.CoordinatorStub(channel))
    for member in live_members(address):
        with connector.channel(member.endpoint, _OPTIONS) as channel:
            found[f"logs/{Path(member.node_id).name}.jsonl"] = _lines(rpc.StorageStub(channel))
    return found


def _lines(stub: rpc.StorageStub | rpc.CoordinatorStub) -> str:
    return "".join(f"{line}\n" for line in stub.Logs(pb.LogsRequest(), timeout=_TIMEOUT_S).lines)


def _json(told: object) -> str:
    return json.dumps(told, indent=2, default=str)
