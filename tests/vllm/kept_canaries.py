"""What the coordinator tells of the canaries that it keeps."""

import grpc

from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_api.v1 import kvstore_pb2_grpc as rpc
from tests.vllm.processes import StoreProcess


def models(store: StoreProcess) -> list[pb.ModelInfo]:
    """The models that canaries are kept of."""
    with grpc.insecure_channel(store.started["address"]) as channel:
        return list(rpc.CoordinatorStub(channel).ListModels(pb.ListModelsRequest()).models)
