"""Calls pass the gate that a fork closes, however they end."""

import grpc
import pytest

from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_api.v1 import kvstore_pb2_grpc as rpc
from kvstore_client.fork import CallGate
from tests.client.conftest import ServedCluster


def test_every_kind_of_call_leaves_the_gate(cluster: ServedCluster) -> None:
    gate = CallGate()
    nobody = "127.0.0.1:1"
    for address, works in ((cluster.address, True), (nobody, False)):
        with grpc.insecure_channel(address) as channel:
            gated = grpc.intercept_channel(channel, gate)
            stub = rpc.CoordinatorStub(gated)
            if works:
                stub.Membership(pb.MembershipRequest(), timeout=30)
            else:
                with pytest.raises(grpc.RpcError) as raised:
                    stub.Membership(pb.MembershipRequest(), timeout=30)
                assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
            assert gate._calls == 0
            assert (stub.Membership.future(pb.MembershipRequest(), timeout=30).exception() is None) is works
            with pytest.raises(grpc.RpcError):  # no such calibration
                list(stub.GetCalibration(pb.GetCalibrationRequest(digest=bytes(32)), timeout=30))
            with pytest.raises(grpc.RpcError):
                stub.PutCalibration(iter([pb.PutCalibrationRequest(data=b"x")]), timeout=30)
            cancelled = rpc.StorageStub(gated).Put(iter(()), timeout=30)
            cancelled.cancel()
            with pytest.raises(grpc.RpcError):
                list(cancelled)
    with gate._changed:
        assert gate._changed.wait_for(lambda: not gate._calls, 30)
