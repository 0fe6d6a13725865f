"""Lookups and leases over a real connection, with the generated client: what any client may rely on."""

import grpc
import pytest

from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_codec.geometry import Geometry
from kvstore_codec.model_spec import KVDtype
from kvstore_service.grpc_storage import MAX_HEADER_BYTES
from tests.sample_chunk import sample_chunk
from tests.service.conftest import ServedNode
from tests.service.storage_calls import END, ref, statuses, steps


def test_all_encodings_come_when_asked_for(storage: ServedNode) -> None:
    variants = [sample_chunk(encoding=name) for name in ("exact-zstd", "high-zstd", "medium-raw")]
    statuses(storage, steps(*variants))

    def lookup(*encodings: str, with_headers: bool = True) -> pb.LookupAnswer:
        (answer,) = storage.stub.Lookup(
            pb.LookupRequest(
                chunks=[ref(variants[0])],
                encodings=encodings,
                with_headers=with_headers,
                all_encodings=True,
                lease_ms=60_000,
            )
        ).answers
        return answer

    answer = lookup("medium-raw", "low-raw", "exact-zstd")
    assert answer.encoding == "medium-raw"
    (other,) = answer.others
    assert (other.encoding, other.size_bytes) == ("exact-zstd", len(variants[0].data))
    assert other.header == variants[0].data[: variants[0].header.header_bytes]
    assert not other.on_disk
    anything = lookup(with_headers=False)
    assert len(anything.others) == 2
    assert not any(other.header for other in anything.others)
    assert lookup("low-raw") == pb.LookupAnswer()
    assert storage.node.stats().leases == 2


def test_headers_only_come_when_asked_for(storage: ServedNode) -> None:
    statuses(storage, steps(sample_chunk()))
    reply = storage.stub.Lookup(pb.LookupRequest(chunks=[ref(sample_chunk())], encodings=["exact-zstd"]))
    assert reply.answers[0].encoding == "exact-zstd"
    assert reply.answers[0].header == b""


def test_headers_beyond_one_reply_are_refused_and_nothing_is_leased(storage: ServedNode) -> None:
    many_frames = Geometry(layers=1024, kv_heads=1, head_dim=1, dtype=KVDtype.BFLOAT16, period_layers=1)
    chunk = sample_chunk(frame_bytes=1, geometry=many_frames)
    assert statuses(storage, steps(chunk)) == [pb.PUT_STATUS_STORED]
    too_many = MAX_HEADER_BYTES // chunk.header.header_bytes + 1

    def lookup(chunks: int) -> pb.LookupReply:
        return storage.stub.Lookup(
            pb.LookupRequest(
                chunks=[ref(chunk)] * chunks, encodings=["exact-zstd"], with_headers=True, lease_ms=60_000
            )
        )

    with pytest.raises(grpc.RpcError) as refusal:
        lookup(too_many)
    assert refusal.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "look fewer chunks up" in refusal.value.details()
    assert storage.node.stats().leases == 0
    assert len(lookup(too_many - 1).answers) == too_many - 1


def test_leases_over_the_wire(storage: ServedNode) -> None:
    chunk = sample_chunk()
    statuses(storage, steps(chunk))
    request = pb.LookupRequest(chunks=[ref(chunk)], encodings=["exact-zstd"], lease_ms=60_000)
    lease_id = storage.stub.Lookup(request).lease_id
    assert len(lease_id) == 16
    assert storage.stub.Stats(pb.StatsRequest()).leases == 1
    assert storage.stub.RenewLease(pb.RenewLeaseRequest(lease_id=lease_id, lease_ms=1000)).renewed
    assert storage.stub.ReleaseLease(pb.ReleaseLeaseRequest(lease_id=lease_id)).released
    assert not storage.stub.ReleaseLease(pb.ReleaseLeaseRequest(lease_id=lease_id)).released
    assert not storage.stub.RenewLease(pb.RenewLeaseRequest(lease_id=lease_id, lease_ms=1000)).renewed


def test_a_peek_is_no_use(storage: ServedNode) -> None:
    chunk = sample_chunk()
    statuses(storage, steps(chunk))
    reply = storage.stub.Lookup(pb.LookupRequest(chunks=[ref(chunk)], encodings=["exact-zstd"], peek=True))
    assert reply.answers[0].size_bytes == len(chunk.data)
    assert storage.stub.Stats(pb.StatsRequest()).counters["lookups"] == 0


def test_unknown_encodings_are_refused_by_name(storage: ServedNode) -> None:
    chunk = sample_chunk()
    request = pb.PutRequest(start=pb.PutStart(chunk=ref(chunk), encoding="exact-magic", size_bytes=10))
    (reply,) = storage.stub.Put(iter([request, END]))
    assert (reply.status, "exact-magic" in reply.message) == (pb.PUT_STATUS_INVALID, True)


def test_another_context_comes_when_it_is_asked_for(storage: ServedNode) -> None:
    stored, wanted = sample_chunk(context=1), sample_chunk(context=2)
    statuses(storage, steps(stored))

    def lookup(**options: bool) -> pb.LookupReply:
        request = pb.LookupRequest(
            chunks=[ref(wanted), ref(stored), ref(sample_chunk(content=9))],
            encodings=["exact-zstd"],
            with_headers=True,
            **options,
        )
        return storage.stub.Lookup(request)

    assert [answer.encoding for answer in lookup().answers] == ["", "exact-zstd", ""]
    other, exact, missing = lookup(any_context=True).answers
    assert (other.encoding, other.prefix_id) == ("exact-zstd", stored.chunk_id.prefix_id)
    assert other.header == exact.header == stored.data[: stored.header.header_bytes]
    assert (exact.prefix_id, missing.prefix_id, missing.encoding) == (b"", b"", "")
    assert storage.stub.Stats(pb.StatsRequest()).counters["approximate_hits"] == 1


def test_a_name_that_is_no_name_is_refused_in_any_context(storage: ServedNode) -> None:
    stored = sample_chunk()
    statuses(storage, steps(stored))
    request = pb.LookupRequest(
        chunks=[pb.ChunkRef(content_id=stored.chunk_id.content_id, prefix_id=b"short")],
        encodings=["exact-zstd"],
        lease_ms=60_000,
        any_context=True,
    )
    with pytest.raises(grpc.RpcError) as caught:
        storage.stub.Lookup(request)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert storage.stub.Stats(pb.StatsRequest()).leases == 0
