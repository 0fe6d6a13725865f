"""Asking a running cluster how it is."""

import grpc

from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_api.v1 import kvstore_pb2_grpc as rpc
from kvstore_codec.errors import ServiceError

_TIMEOUT_S = 5.0


def cluster_stats(address: str) -> pb.ClusterStatsReply:
    """Raises ServiceError when no coordinator answers at `address`."""
    with grpc.insecure_channel(address, [("grpc.enable_http_proxy", 0)]) as channel:
        stub = rpc.CoordinatorStub(channel)
        try:
            reply: pb.ClusterStatsReply = stub.ClusterStats(pb.ClusterStatsRequest(), timeout=_TIMEOUT_S)
        except grpc.RpcError as error:
            raise ServiceError(
                f"no coordinator answers at {address} ({error.code().name}); "
                "start one with `kvstore serve`, or name another with --address"
            ) from error
        return reply
