"""The calibration calls over the wire: what is refused, with which status, and what stays."""

import json
import queue
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import grpc
import pytest
from blake3 import blake3
from typer.testing import CliRunner

from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_api.v1 import kvstore_pb2_grpc as rpc
from kvstore_cluster.calibrations import CalibrationRegistry
from kvstore_cluster.canaries import CanaryRegistry
from kvstore_cluster.catalogue import FileCatalogue
from kvstore_cluster.coordinator import Coordinator
from kvstore_service.cli.app import app
from kvstore_service.grpc_coordinator import serve_coordinator
from kvstore_service.grpc_server import MAX_STREAMS
from kvstore_service.listen import Address

MODEL = b"m" * 32
DATA = bytes(range(256)) * 8192  # two pieces
MIB = 1 << 20


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    catalogue = FileCatalogue(tmp_path)
    registry = CalibrationRegistry(tmp_path / "calibrations")
    canaries = CanaryRegistry(tmp_path / "canaries")
    server = serve_coordinator(Coordinator(catalogue), registry, canaries, address=Address("127.0.0.1", 0))
    yield server.address
    server.stop(0)
    catalogue.close()
    assert not list((tmp_path / "calibrations").glob(".unfinished*"))


@pytest.fixture
def stub(address: str) -> Iterator[rpc.CoordinatorStub]:
    with grpc.insecure_channel(address) as channel:
        yield rpc.CoordinatorStub(channel)


def start(data: bytes, **changed: object) -> pb.PutCalibrationRequest:
    fields = {"digest": blake3(data).digest(), "model_digest": MODEL, "size_bytes": len(data)} | changed
    return pb.PutCalibrationRequest(start=pb.CalibrationInfo(**fields))


def steps(data: bytes) -> Iterator[pb.PutCalibrationRequest]:
    yield start(data)
    for begin in range(0, len(data), MIB):
        yield pb.PutCalibrationRequest(data=data[begin : begin + MIB])


def find(stub: rpc.CoordinatorStub) -> bytes:
    return stub.FindCalibration(pb.FindCalibrationRequest(model_digest=MODEL)).digest


def test_put_find_list_get(stub: rpc.CoordinatorStub) -> None:
    assert find(stub) == b""
    stub.PutCalibration(steps(DATA))
    digest = blake3(DATA).digest()
    assert find(stub) == digest
    (info,) = stub.ListCalibrations(pb.ListCalibrationsRequest()).calibrations
    assert info == pb.CalibrationInfo(digest=digest, model_digest=MODEL, size_bytes=len(DATA))
    pieces = [reply.data for reply in stub.GetCalibration(pb.GetCalibrationRequest(digest=digest))]
    assert [len(piece) for piece in pieces] == [MIB, MIB]
    assert b"".join(pieces) == DATA


def data(*pieces: bytes) -> list[pb.PutCalibrationRequest]:
    return [pb.PutCalibrationRequest(data=piece) for piece in pieces]


@pytest.mark.parametrize(
    ("requests", "status", "message"),
    [
        ([], "INVALID_ARGUMENT", "the first one was not a start"),
        (data(b"x"), "INVALID_ARGUMENT", "the first one was not a start"),
        ([start(b"x"), start(b"x")], "INVALID_ARGUMENT", "a step after the start was not data"),
        ([start(b"x", digest=b"short")], "INVALID_ARGUMENT", "a digest has 32 bytes, not 5"),
        ([start(b"x", model_digest=b"")], "INVALID_ARGUMENT", "a digest has 32 bytes, not 0"),
        ([start(DATA), *data(DATA)], "INVALID_ARGUMENT", "a piece has 2097152 bytes"),
        ([start(b"xy"), *data(b"x")], "INVALID_ARGUMENT", "announced with a size of 2 bytes, but has 1"),
        ([start(b"xy"), *data(b"xyz")], "INVALID_ARGUMENT", "announced with a size of 2 bytes, but has more"),
        ([start(b"xy"), *data(b"xz")], "DATA_LOSS", "send them again"),
        ([start(b"x", size_bytes=(1 << 30) + 1)], "RESOURCE_EXHAUSTED", "at most 1073741824"),
    ],
)
def test_what_is_refused(
    stub: rpc.CoordinatorStub, requests: Iterable[pb.PutCalibrationRequest], status: str, message: str
) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        stub.PutCalibration(iter(requests))
    assert refused.value.code().name == status
    assert message in refused.value.details()
    assert find(stub) == b""


@pytest.mark.parametrize(("digest", "status"), [(b"d" * 32, "NOT_FOUND"), (b"d", "INVALID_ARGUMENT")])
def test_digests_that_name_nothing(stub: rpc.CoordinatorStub, digest: bytes, status: str) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        list(stub.GetCalibration(pb.GetCalibrationRequest(digest=digest)))
    assert refused.value.code().name == status


def test_damage_on_disk_is_data_loss(stub: rpc.CoordinatorStub, tmp_path: Path) -> None:
    stub.PutCalibration(steps(DATA))
    (file,) = (tmp_path / "calibrations").iterdir()
    file.write_bytes(DATA[:-1] + b"x")
    with pytest.raises(grpc.RpcError) as refused:
        list(stub.GetCalibration(pb.GetCalibrationRequest(digest=blake3(DATA).digest())))
    assert refused.value.code().name == "DATA_LOSS"


def test_idle_uploads_do_not_take_every_thread(stub: rpc.CoordinatorStub) -> None:
    requests: queue.SimpleQueue[pb.PutCalibrationRequest | None] = queue.SimpleQueue()
    idle = [stub.PutCalibration.future(iter(requests.get, None)) for _ in range(MAX_STREAMS + 1)]
    deadline_s = time.monotonic() + 30
    while not any(call.done() for call in idle):
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    (refusal,) = [call for call in idle if call.done()]
    assert refusal.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert stub.FindCalibration(pb.FindCalibrationRequest(model_digest=MODEL), timeout=60).digest == b""
    for call in idle:
        call.cancel()
        requests.put(None)


def test_the_command_lists_them(stub: rpc.CoordinatorStub, address: str) -> None:
    stub.PutCalibration(steps(DATA))
    digest = blake3(DATA).hexdigest()
    printed = CliRunner().invoke(app, ["calibrations", "--address", address, "--json"])
    assert json.loads(printed.stdout) == {
        "calibrations": [{"digest": digest, "model_digest": MODEL.hex(), "size_bytes": len(DATA)}]
    }
    table = CliRunner().invoke(app, ["calibrations", "--address", address]).stdout
    assert all(text in table for text in (digest[:12], MODEL.hex()[:12], "2.1 MB"))
