"""Fields of requests that are kept, or repeated in messages, have a length; what is longer is refused by name."""

from collections.abc import Iterator

import grpc
import pytest

from kvstore_api.frames import MAX_PUT_START_BYTES, FrameKind, pack_header
from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_api.v1 import kvstore_pb2_grpc as rpc
from kvstore_cluster.names import MAX_TENANT_BYTES
from kvstore_service import large_requests
from kvstore_service.grpc_puts import put_chunks
from kvstore_service.grpc_server import SMALL_REQUEST_BYTES
from kvstore_service.large_requests import SMALL_BYTES
from tests.sample_chunk import sample_chunk
from tests.service.bulk_port import reply, served_port
from tests.service.conftest import ServedNode
from tests.service.storage_calls import END, ref
from tests.service.test_grpc_directives import coordinator, stub  # noqa: F401 (fixtures)

CHUNK = sample_chunk()
LONG_FIELDS = {
    "calibration": bytes(5000),
    "short calibration": bytes(31),
    "encoding": "x" * 5000,
    "tenant": "x" * 5000,
}


def start(name: str) -> pb.PutStart:
    whole = pb.PutStart(chunk=ref(CHUNK), encoding=CHUNK.encoding, size_bytes=len(CHUNK.data))
    setattr(whole, name.split()[-1], LONG_FIELDS[name])
    return whole


def require_refusal(answer: pb.PutReply, name: str) -> None:
    assert answer.status == pb.PUT_STATUS_INVALID
    assert name.split()[-1] in answer.message
    assert len(answer.message) < 200


@pytest.mark.parametrize("name", LONG_FIELDS)
def test_a_put_with_a_field_of_another_length_is_refused_on_both_ports(
    storage: ServedNode, name: str
) -> None:
    (answer,) = storage.stub.Put(iter([pb.PutRequest(start=start(name)), END]))
    require_refusal(answer, name)
    assert storage.node.stats().chunks == 0
    with served_port() as port, port.connected() as connected:
        message = start(name).SerializeToString()
        connected.sendall(pack_header(FrameKind.PUT, len(message)) + message + CHUNK.data)
        require_refusal(reply(connected), name)
        assert port.node.stats().chunks == 0


def put_stream(storage: ServedNode, message: bytes) -> list[bytes]:
    return list(storage.channel.stream_stream("/kvstore.v1.Storage/Put")(iter([message])))


@pytest.mark.parametrize("tag", [b"\x0a", b"\x1a", b"\x7a"], ids=["start", "end", "unknown"])
def test_a_step_of_a_put_other_than_data_is_short(storage: ServedNode, tag: bytes) -> None:
    """8 MiB of empty references took 75 MiB, and were kept until the next step came."""
    length = MAX_PUT_START_BYTES + 1
    step = tag + bytes([0x80 | length & 0x7F, 0x80 | length >> 7 & 0x7F, length >> 14])
    with pytest.raises(grpc.RpcError) as refusal:
        put_stream(storage, step + b"\x52\x00" * (length // 2) + b"\x52")
    assert refusal.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert f"at most {MAX_PUT_START_BYTES} bytes" in refusal.value.details()


def test_what_is_no_step_of_a_put_is_refused(storage: ServedNode) -> None:
    with pytest.raises(grpc.RpcError) as refusal:
        put_stream(storage, b"\x0a\xff")
    assert refusal.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "not a PutRequest" in refusal.value.details()


def test_data_of_a_put_is_not_kept_until_more_comes(storage: ServedNode) -> None:
    def steps() -> Iterator[pb.PutRequest | memoryview]:
        data = bytearray(CHUNK.data)
        yield pb.PutRequest(
            start=pb.PutStart(chunk=ref(CHUNK), encoding=CHUNK.encoding, size_bytes=len(data))
        )
        yield memoryview(data)
        data.clear()  # raises BufferError while anybody has a view of it
        yield END

    (reply,) = put_chunks(storage.node, steps())
    assert reply.status == pb.PUT_STATUS_STORED


def test_millions_of_empty_fields_are_refused_in_a_stream(stub: rpc.CoordinatorStub) -> None:  # noqa: F811
    unknown = pb.PutCalibrationRequest.FromString(b"\x7a\x00" * (1 << 20))
    with pytest.raises(grpc.RpcError) as refusal:
        stub.PutCalibration(iter([unknown]))
    assert refusal.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "fields in one request" in refusal.value.details()


def test_a_prefix_longer_than_what_it_begins_is_refused(storage: ServedNode) -> None:
    with pytest.raises(grpc.RpcError) as refusal:
        storage.stub.List(pb.ListRequest(content_prefix=bytes(33)))
    assert refusal.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "a content_prefix has 33 bytes; at most 32" in refusal.value.details()


def test_a_list_of_a_tenant_longer_than_any_is_refused(
    storage: ServedNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of more than 512 KiB waited for itself, and had all others wait meanwhile."""
    monkeypatch.setattr(large_requests, "PATIENCE_S", 0.2)
    for tenant_bytes, limit in (
        (MAX_TENANT_BYTES + 1, "tenant has 256 bytes; at most 255"),
        (SMALL_BYTES, "at most"),
    ):
        with pytest.raises(grpc.RpcError) as refusal:
            storage.stub.List(pb.ListRequest(tenant="x" * tenant_bytes))
        assert refusal.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert limit in refusal.value.details()


@pytest.mark.parametrize(
    "method", ["RenewLease", "ReleaseLease", "Use", "List", "Verify", "Stats", "Throttle"]
)
def test_a_request_that_names_no_chunks_is_short(storage: ServedNode, method: str) -> None:
    """Whatever an unknown field, which is kept, makes it."""
    ask = storage.channel.unary_stream if method == "Verify" else storage.channel.unary_unary
    unknown = b"\x7a" + b"\x80\x80\x01" + bytes(SMALL_REQUEST_BYTES)
    with pytest.raises(grpc.RpcError) as refusal:
        list(ask(f"/kvstore.v1.Storage/{method}")(unknown))
    assert refusal.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert f"at most {SMALL_REQUEST_BYTES}" in refusal.value.details()


@pytest.mark.parametrize("cancel", [False, True])
def test_long_names_do_not_reach_the_catalogue(
    stub: rpc.CoordinatorStub,  # noqa: F811
    cancel: bool,
) -> None:
    long = "x" * (MAX_TENANT_BYTES + 1)
    for call, request in (
        (stub.SetQuota, pb.SetQuotaRequest(quota=pb.Quota(tenant=long, limit_bytes=int(not cancel)))),
        (stub.Drain, pb.DrainRequest(node_id=long, cancel=cancel)),
    ):
        with pytest.raises(grpc.RpcError) as refusal:
            call(request)
        assert refusal.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert f"bytes; at most {MAX_TENANT_BYTES}" in refusal.value.details()
    assert not stub.ListQuotas(pb.ListQuotasRequest()).quotas
