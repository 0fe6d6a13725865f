"""The canary calls of the Coordinator service, over the wire."""

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_api.v1 import kvstore_pb2_grpc as rpc
from kvstore_cluster.calibrations import CalibrationRegistry
from kvstore_cluster.canaries import CanaryRegistry
from kvstore_cluster.catalogue import FileCatalogue
from kvstore_cluster.coordinator import Coordinator
from kvstore_cluster.encryption import EncryptionKeys, FileCipher
from kvstore_codec.canary import MAX_SKETCH_BYTES
from kvstore_service.grpc_canaries import client_of
from kvstore_service.grpc_coordinator import serve_coordinator
from kvstore_service.listen import Address
from tests.cluster.canaries.test_registry import MODEL, sketch


@pytest.fixture
def stub(tmp_path: Path) -> Iterator[rpc.CoordinatorStub]:
    catalogue = FileCatalogue(tmp_path)
    calibrations = CalibrationRegistry(tmp_path / "calibrations")
    canaries = CanaryRegistry(tmp_path / "canaries")
    server = serve_coordinator(
        Coordinator(catalogue), calibrations, canaries, address=Address("127.0.0.1", 0)
    )
    with grpc.insecure_channel(server.address) as channel:
        served = rpc.CoordinatorStub(channel)
        served.address = server.address
        yield served
    server.stop(0)
    catalogue.close()


def origin(host: str) -> pb.Origin:
    return pb.Origin(model_id="model", host=host, pid=3, software="torch", device="cpu", dtype="float32")


def put(stub: rpc.CoordinatorStub, fill: int, host: str, generation: int = 0) -> pb.CanaryReply:
    request = pb.PutCanaryRequest(
        model_digest=MODEL, generation=generation, origin=origin(host), sketch=sketch(fill)
    )
    return stub.PutCanary(request)


def test_the_first_worker_makes_it_and_everybody_gets_it(stub: rpc.CoordinatorStub) -> None:
    assert stub.GetCanary(pb.GetCanaryRequest(model_digest=MODEL)) == pb.CanaryReply(origin=pb.Origin())
    for reply in (
        put(stub, 1, "first"),
        put(stub, 2, "second"),
        stub.GetCanary(pb.GetCanaryRequest(model_digest=MODEL)),
    ):
        assert (reply.sketch, reply.origin, reply.generation) == (sketch(1), origin("first"), 0)
        assert reply.created_unix_s > 0


def test_models_are_listed_with_both_sides_of_a_refusal(stub: rpc.CoordinatorStub) -> None:
    put(stub, 1, "maker")
    for _ in range(2):
        stub.ReportRefusal(
            pb.ReportRefusalRequest(model_digest=MODEL, origin=origin("refused"), message="differs by 2")
        )
    (model,) = stub.ListModels(pb.ListModelsRequest()).models
    assert (model.model_digest, model.origin, model.size_bytes) == (MODEL, origin("maker"), len(sketch()))
    (refusal,) = model.refusals
    assert (refusal.origin, refusal.message, refusal.times) == (origin("refused"), "differs by 2", 2)
    assert refusal.last_unix_s >= model.created_unix_s


def test_a_replacement_is_heard_of_with_the_membership(stub: rpc.CoordinatorStub) -> None:
    put(stub, 2, "wrong")
    assert stub.Membership(pb.MembershipRequest()).canary_changes == 0
    stub.ReportRefusal(pb.ReportRefusalRequest(model_digest=MODEL, origin=origin("right"), message="differs"))
    assert stub.ReplaceCanary(pb.ReplaceCanaryRequest(model_digest=MODEL)).generation == 1
    assert stub.Membership(pb.MembershipRequest()).canary_changes == 1
    (model,) = stub.ListModels(pb.ListModelsRequest()).models
    assert (model.generation, model.size_bytes, list(model.refusals), model.origin.model_id) == (
        1,
        0,
        [],
        "model",
    )
    assert put(stub, 2, "wrong").sketch == b""  # compared before the replacement
    reply = put(stub, 1, "right", generation=1)
    assert (reply.sketch, reply.canary_changes) == (sketch(1), 1)


def test_a_canary_whose_key_is_gone_is_no_unknown_error(stub: rpc.CoordinatorStub, tmp_path: Path) -> None:
    put(stub, 1, "first")
    [path] = (tmp_path / "canaries").iterdir()
    keys = EncryptionKeys([b"k" * 32])
    path.write_bytes(FileCipher(lambda: keys).encrypt(path, path.read_bytes()))
    for call in (lambda: stub.GetCanary(pb.GetCanaryRequest(model_digest=MODEL)), lambda: put(stub, 2, "x")):
        with pytest.raises(grpc.RpcError, match=f"encrypted with key {keys.first.name}") as error:
            call()
        assert error.value.code() == grpc.StatusCode.FAILED_PRECONDITION


@pytest.mark.parametrize(
    ("peer", "client"),
    [
        ("ipv4:10.0.0.7:51204", "10.0.0.7"),
        ("ipv6:%5B2001:db8::7%5D:51204", "2001:db8::/64"),
        ("ipv6:[2001:db8::8]:1", "2001:db8::/64"),
        ("ipv6:[fe80::1%eth0]:1", "fe80::/64"),
        ("unix:/run/kvstore.sock", "unix:/run/kvstore.sock"),
        ("ipv6:nonsense", "ipv6:nonsense"),
        ("", ""),
    ],
)
def test_a_client_is_its_host(peer: str, client: str) -> None:
    assert client_of(peer) == client


@pytest.mark.parametrize(
    ("call", "request_", "code"),
    [
        ("GetCanary", pb.GetCanaryRequest(model_digest=b"short"), grpc.StatusCode.INVALID_ARGUMENT),
        (
            "PutCanary",
            pb.PutCanaryRequest(model_digest=b"", sketch=sketch()),
            grpc.StatusCode.INVALID_ARGUMENT,
        ),
        (
            "PutCanary",
            pb.PutCanaryRequest(model_digest=b"x" * 32, sketch=sketch()),
            grpc.StatusCode.INVALID_ARGUMENT,
        ),
        (
            "PutCanary",
            pb.PutCanaryRequest(model_digest=MODEL, sketch=b"KVK"),
            grpc.StatusCode.INVALID_ARGUMENT,
        ),
        (
            "PutCanary",
            pb.PutCanaryRequest(model_digest=MODEL, sketch=bytes(MAX_SKETCH_BYTES + 1)),
            grpc.StatusCode.INVALID_ARGUMENT,
        ),
        ("ReportRefusal", pb.ReportRefusalRequest(model_digest=b"x"), grpc.StatusCode.INVALID_ARGUMENT),
        ("ReplaceCanary", pb.ReplaceCanaryRequest(model_digest=MODEL), grpc.StatusCode.NOT_FOUND),
    ],
)
def test_what_makes_no_sense_is_refused(
    stub: rpc.CoordinatorStub, call: str, request_: object, code: grpc.StatusCode
) -> None:
    with pytest.raises(grpc.RpcError) as error:
        getattr(stub, call)(request_)
    assert error.value.code() == code
    assert stub.ListModels(pb.ListModelsRequest()).models == []
