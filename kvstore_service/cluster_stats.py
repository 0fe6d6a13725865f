"""Calls that ask a running cluster for its state."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_api.v1 import kvstore_pb2_grpc as rpc
from kvstore_client.connector import Connector
from kvstore_client.grpc_failure import predicate_of
from kvstore_client.settings import security_from_environment
from kvstore_codec.errors import ServiceError
from kvstore_service.background_health import BACKGROUND

SERVE = "kvstore serve"
_TIMEOUT_S = 5.0
_REFUSALS = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)


def environment_connector() -> Connector:
    """Opens connections as `KVSTORE_*` variables say. Raises ConfigurationError."""
    return Connector(security_from_environment())


def cluster_stats(
    address: str, *, start: str = SERVE, connector: Connector | None = None
) -> pb.ClusterStatsReply:
    """State of the cluster and its nodes. `start` is the command that the error advises. `connector` is by default that
    of the environment. Raises ServiceError if no coordinator answers at `address`."""
    with _coordinator(address, start, connector) as stub:
        reply: pb.ClusterStatsReply = stub.ClusterStats(pb.ClusterStatsRequest(), timeout=_TIMEOUT_S)
        return reply


def live_members(address: str, *, start: str = SERVE, connector: Connector | None = None) -> list[pb.Member]:
    """The live nodes of the cluster. Unlike their state, a credential of one tenant may ask for them. Arguments and
    errors are those of `cluster_stats`."""
    with _coordinator(address, start, connector) as stub:
        return list(stub.Membership(pb.MembershipRequest(), timeout=_TIMEOUT_S).members)


def predicted(address: str, request: pb.PredictRequest) -> pb.PredictReply:
    """The answer of the coordinator at `address`. Raises ServiceError if none answers there."""
    with _coordinator(address) as stub:
        reply: pb.PredictReply = stub.Predict(request, timeout=_TIMEOUT_S)
        return reply


def background_works(address: str) -> bool:
    """Whether all background loops of the coordinator work. Raises ServiceError if no coordinator answers at
    `address`."""
    with _coordinator_channel(address) as channel:
        try:
            status = serving_status(channel, BACKGROUND, _TIMEOUT_S)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.NOT_FOUND:  # an older coordinator, which does not report it
                return True
            raise
        return bool(status == health_pb2.HealthCheckResponse.SERVING)


def serving_status(channel: grpc.Channel, service: str, timeout_s: float) -> int:
    """What gRPC's health service says of the name `service`: a `HealthCheckResponse.ServingStatus`. Raises
    grpc.RpcError."""
    request = health_pb2.HealthCheckRequest(service=service)
    status: int = health_pb2_grpc.HealthStub(channel).Check(request, timeout=timeout_s).status
    return status


def list_calibrations(address: str) -> list[pb.CalibrationInfo]:
    """Calibrations in the cluster's registry, oldest first. Raises ServiceError if no coordinator answers at
    `address`."""
    with _coordinator(address) as stub:
        reply = stub.ListCalibrations(pb.ListCalibrationsRequest(), timeout=_TIMEOUT_S)
        return list(reply.calibrations)


def known_models(address: str, connector: Connector) -> dict[str, Any]:
    """Models with a canary, and calibrations, as plain values. Raises ServiceError if no coordinator answers at
    `address`."""
    with _coordinator(address, connector=connector) as stub:
        models = stub.ListModels(pb.ListModelsRequest(), timeout=_TIMEOUT_S).models
        calibrations = stub.ListCalibrations(pb.ListCalibrationsRequest(), timeout=_TIMEOUT_S).calibrations
    names = {model.model_digest: model.origin.model_id for model in models}
    return {
        "models": [
            {
                "digest": model.model_digest.hex()[:12],
                "model_id": model.origin.model_id,
                "dtype": model.origin.dtype,
                "host": model.origin.host,
                "refused": len(model.refusals),
            }
            for model in models
        ],
        "calibrations": [
            {
                "digest": info.digest.hex()[:12],
                "model": info.model_digest.hex()[:12],
                "model_id": names.get(info.model_digest, ""),
                "bytes": info.size_bytes,
            }
            for info in calibrations
        ],
    }


@contextmanager
def _coordinator(
    address: str, start: str = SERVE, connector: Connector | None = None
) -> Iterator[rpc.CoordinatorStub]:
    with _coordinator_channel(address, start, connector) as channel:
        yield rpc.CoordinatorStub(channel)


@contextmanager
def _coordinator_channel(
    address: str, start: str = SERVE, connector: Connector | None = None
) -> Iterator[grpc.Channel]:
    connector = connector or environment_connector()
    with connector.channel(address) as channel:
        try:
            yield channel
        except grpc.RpcError as error:
            if error.code() in _REFUSALS:
                raise ServiceError(f"the coordinator at {address} refused: {error.details()}") from error
            predicate = predicate_of(error)
            if "TLS" in predicate:
                raise ServiceError(f"the coordinator at {address} {predicate}") from error
            raise ServiceError(
                f"no cluster answers at {address}; start one with `{start}`, or give another coordinator's host:port "
                "with --address"
            ) from error
