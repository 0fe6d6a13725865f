"""Asking a running cluster how it is."""

from collections.abc import Iterator
from contextlib import contextmanager

import grpc

from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_api.v1 import kvstore_pb2_grpc as rpc
from kvstore_codec.errors import ServiceError

_TIMEOUT_S = 5.0


def cluster_stats(address: str) -> pb.ClusterStatsReply:
    """Raises ServiceError when no coordinator answers at `address`."""
    with _coordinator(address) as stub:
        reply: pb.ClusterStatsReply = stub.ClusterStats(pb.ClusterStatsRequest(), timeout=_TIMEOUT_S)
        return reply


def list_calibrations(address: str) -> list[pb.CalibrationInfo]:
    """What the registry has, oldest first. Raises ServiceError when no coordinator answers at `address`."""
    with _coordinator(address) as stub:
        reply = stub.ListCalibrations(pb.ListCalibrationsRequest(), timeout=_TIMEOUT_S)
        return list(reply.calibrations)


@contextmanager
def _coordinator(address: str) -> Iterator[rpc.CoordinatorStub]:
    with grpc.insecure_channel(address, [("grpc.enable_http_proxy", 0)]) as channel:
        try:
            yield rpc.CoordinatorStub(channel)
        except grpc.RpcError as error:
            raise ServiceError(
                f"no coordinator answers at {address} ({error.code().name}); "
                "start one with `kvstore serve`, or name another with --address"
            ) from error
