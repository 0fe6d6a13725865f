"""The Storage service over a real connection, with the generated client: what any client may rely on."""

import queue
import threading

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_service.grpc_server import MAX_STREAMS
from tests.sample_chunk import sample_chunk
from tests.service.conftest import ServedNode
from tests.service.storage_calls import END, SERVICE, data, read, ref, start, statuses, steps, wait_until


def test_put_lookup_and_read(storage: ServedNode) -> None:
    first, second = sample_chunk(content=1), sample_chunk(content=2)
    assert statuses(storage, steps(first, second)) == [pb.PUT_STATUS_STORED] * 2
    missing, elsewhere = sample_chunk(content=3), sample_chunk(content=1, context=1)
    reply = storage.stub.Lookup(
        pb.LookupRequest(
            chunks=[ref(chunk) for chunk in (first, missing, second, elsewhere)],
            encodings=["high-zstd", "exact-zstd"],
            with_headers=True,
        )
    )
    assert [answer.encoding for answer in reply.answers] == ["exact-zstd", "", "exact-zstd", ""]
    assert [answer.other_contexts for answer in reply.answers] == [0, 0, 0, 1]
    assert reply.answers[0].header == first.data[: first.header.header_bytes]
    assert reply.answers[0].size_bytes == len(first.data)
    assert reply.lease_id == b""
    frames = first.header.geometry.frame_count
    parts = read(storage, [first, second], [(1, 0, frames), (0, 2, 1), (1, 3, 2)], piece_bytes=1234)
    assert parts == {0: second.frames(0, frames), 1: first.frames(2, 1), 2: second.frames(3, 2)}


def test_a_client_that_goes_away_in_a_read_frees_what_it_held(large_storage: ServedNode) -> None:
    chunk = sample_chunk(frame_bytes=4 << 20)
    statuses(large_storage, [start(chunk), *data(chunk, 1 << 20), END])
    call = large_storage.stub.Read(
        pb.ReadRequest(
            chunks=[ref(chunk)],
            encodings=[chunk.encoding],
            ranges=[pb.ReadRange(chunk=0, first_frame=0, frame_count=8)] * 20,
        )
    )
    next(call)
    large_storage.node.delete([chunk.chunk_id])
    assert large_storage.node.stats().bytes_used > 0
    call.cancel()
    wait_until(lambda: large_storage.node.stats().bytes_used == 0)


def test_ranges_that_cannot_be_read_do_not_stop_the_others(storage: ServedNode) -> None:
    chunk, missing = sample_chunk(content=1), sample_chunk(content=2)
    statuses(storage, steps(chunk))
    ranges = [(1, 0, 1), (0, 0, 99), (0, 1, 0), (0, 1 << 31, 1 << 31), (0, 7, 1)]
    assert read(storage, [chunk, missing], ranges) == {
        0: b"READ_STATUS_NOT_FOUND",
        1: b"READ_STATUS_INVALID_RANGE",
        2: b"READ_STATUS_INVALID_RANGE",
        3: b"READ_STATUS_INVALID_RANGE",
        4: chunk.frames(7, 1),
    }


def test_delete_and_stats(storage: ServedNode) -> None:
    exact, high = sample_chunk(), sample_chunk(encoding="high-zstd")
    statuses(storage, steps(exact, high))
    read(storage, [exact], [(0, 0, 1), (0, 1, 1)])
    stats = storage.stub.Stats(pb.StatsRequest())
    assert (stats.node_id, stats.chunks, stats.bytes_limit) == ("node-0", 2, 4 << 20)
    assert stats.bytes_used >= len(exact.data) + len(high.data)
    assert stats.counters["puts"] == 2
    assert stats.counters["reads"] == 2
    assert stats.counters["bytes_in"] == len(exact.data) + len(high.data)
    assert stats.counters["bytes_out"] == len(exact.frames(0, 2))
    assert (
        storage.stub.Delete(pb.DeleteRequest(chunks=[ref(exact), ref(sample_chunk(content=9))])).deleted == 2
    )
    assert storage.stub.Stats(pb.StatsRequest()).bytes_used == 0


def test_a_whole_chunk_is_read_with_its_header(storage: ServedNode) -> None:
    chunk = sample_chunk()
    statuses(storage, steps(chunk))
    assert read(storage, [chunk], [(0, 0, 0)], piece_bytes=777) == {0: chunk.data}


def test_reports_of_attention_are_taken(storage: ServedNode) -> None:
    chunk = sample_chunk()
    statuses(storage, steps(chunk))
    unknown = ref(sample_chunk(content=5))
    storage.stub.Report(pb.ReportRequest(chunks=[ref(chunk), unknown], scores=[0.5, 1.0]))


def test_verify_finds_damage_in_memory_and_removes_it(storage: ServedNode) -> None:
    chunks = [sample_chunk(content=number) for number in range(5)]
    statuses(storage, steps(*chunks))
    assert [(reply.checked, reply.done) for reply in storage.stub.Verify(pb.VerifyRequest())][-1] == (5, True)
    pending = storage.node.begin_put(sample_chunk(content=9).chunk_id, "exact-zstd", 1000)
    assert pending is not None
    views = pending.views()
    pending.revoke()
    # The memory of another chunk, written where nothing may be written any more.
    statuses(storage, steps(sample_chunk(content=9)))
    next(views)[900] ^= 1
    replies = list(storage.stub.Verify(pb.VerifyRequest()))
    (damaged,) = [damage for reply in replies for damage in reply.damaged]
    assert damaged.variant.chunk == ref(sample_chunk(content=9))
    assert "damaged" in damaged.reason
    assert storage.stub.Stats(pb.StatsRequest()).chunks == 5


SHORT_ID = pb.ChunkRef(content_id=b"short", prefix_id=bytes(32))
MANY = [pb.ChunkRef(content_id=bytes(32), prefix_id=bytes(32))] * 65_537


@pytest.mark.parametrize(
    "call",
    [
        lambda stub: stub.Lookup(pb.LookupRequest(chunks=[SHORT_ID])),
        lambda stub: stub.Lookup(pb.LookupRequest(chunks=MANY)),
        lambda stub: stub.Lookup(pb.LookupRequest(encodings=["exact-zstd"] * 65)),
        lambda stub: stub.Delete(pb.DeleteRequest(chunks=[SHORT_ID])),
        lambda stub: stub.Delete(pb.DeleteRequest(chunks=MANY)),
        lambda stub: stub.Report(pb.ReportRequest(chunks=MANY[:2], scores=[0.5])),
        lambda stub: stub.Report(pb.ReportRequest(chunks=MANY[:1], scores=[float("nan")])),
        lambda stub: stub.Report(pb.ReportRequest(tenant="t" * 256)),
        lambda stub: stub.RenewLease(pb.RenewLeaseRequest(lease_id=b"")),
        lambda stub: stub.ReleaseLease(pb.ReleaseLeaseRequest(lease_id=bytes(17))),
        lambda stub: list(stub.Read(pb.ReadRequest(chunks=[SHORT_ID], encodings=["exact-zstd"]))),
        lambda stub: list(stub.Read(pb.ReadRequest(chunks=MANY[:2], encodings=["exact-zstd"]))),
        lambda stub: list(stub.Read(pb.ReadRequest(ranges=[pb.ReadRange(chunk=0, frame_count=1)]))),
        lambda stub: list(stub.Read(pb.ReadRequest(ranges=[pb.ReadRange()] * ((1 << 20) + 1)))),
        lambda stub: list(stub.Put(iter([pb.PutRequest()]))),
        lambda stub: list(stub.Put(iter([END]))),
        lambda stub: list(stub.Put(iter([pb.PutRequest(data=b"x")]))),
        lambda stub: list(stub.Put(iter([pb.PutRequest(start=pb.PutStart(chunk=SHORT_ID))]))),
    ],
)
def test_malformed_requests_are_refused(storage: ServedNode, call) -> None:
    with pytest.raises(grpc.RpcError) as refusal:
        call(storage.stub)
    assert refusal.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert refusal.value.details()


def test_messages_above_the_limit_are_refused(storage: ServedNode) -> None:
    with pytest.raises(grpc.RpcError) as refusal:
        statuses(storage, [start(sample_chunk()), pb.PutRequest(data=bytes(9 << 20)), END])
    assert refusal.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    wait_until(lambda: storage.node.stats().bytes_used == 0)


def test_health_and_reflection(storage: ServedNode) -> None:
    health = health_pb2_grpc.HealthStub(storage.channel)
    for service in ("", SERVICE):
        status = health.Check(health_pb2.HealthCheckRequest(service=service)).status
        assert status == health_pb2.HealthCheckResponse.SERVING
    reflection = reflection_pb2_grpc.ServerReflectionStub(storage.channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    (reply,) = reflection.ServerReflectionInfo(iter([request]))
    names = {service.name for service in reply.list_services_response.service}
    assert {SERVICE, "grpc.health.v1.Health"} <= names


def test_a_stopping_server_refuses_new_calls_and_ends_old_ones(storage: ServedNode) -> None:
    chunk = sample_chunk()
    requests: queue.Queue = queue.Queue()
    requests.put(start(chunk))
    call = storage.stub.Put(iter(requests.get, None))
    wait_until(lambda: storage.node.stats().bytes_used > 0)
    stopping = threading.Thread(target=storage.server.stop, args=(0.2,))
    stopping.start()

    def refused() -> bool:
        try:
            storage.stub.Stats(pb.StatsRequest())
        except grpc.RpcError as refusal:
            return refusal.code() == grpc.StatusCode.UNAVAILABLE
        return False

    wait_until(refused)
    stopping.join()
    with pytest.raises(grpc.RpcError):
        list(call)
    requests.put(None)
    assert storage.node.stats().bytes_used == 0


@pytest.mark.parametrize("kind", ["puts", "reflection"])
def test_open_streams_never_keep_small_calls_waiting(storage: ServedNode, kind: str) -> None:
    requests: queue.Queue = queue.Queue()
    reflection = reflection_pb2_grpc.ServerReflectionStub(storage.channel)
    stream = storage.stub.Put if kind == "puts" else reflection.ServerReflectionInfo
    idle = [stream(iter(requests.get, None)) for _ in range(MAX_STREAMS + 1)]
    # Too many are refused, never queued.
    wait_until(lambda: any(call.done() for call in idle))
    (refusal,) = [call for call in idle if call.done()]
    assert refusal.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert storage.stub.Stats(pb.StatsRequest(), timeout=20).node_id == "node-0"
    for call in idle:
        call.cancel()
        requests.put(None)
    wait_until(lambda: statuses_or_busy(storage) == [])


def statuses_or_busy(storage: ServedNode) -> list[int] | str:
    try:
        return statuses(storage, [])
    except grpc.RpcError as error:
        return error.code().name


def test_many_clients_at_once(large_storage: ServedNode) -> None:
    chunks = [sample_chunk(content=number, frame_bytes=20_000) for number in range(24)]

    def work(number: int) -> None:
        try:
            mine = chunks[number * 3 : number * 3 + 3]
            assert statuses(large_storage, steps(*mine)) == [pb.PUT_STATUS_STORED] * 3
            for chunk in mine:
                assert read(large_storage, [chunk], [(0, 0, 8)]) == {0: chunk.frames(0, 8)}
        except BaseException as error:
            failures.append(error)
            raise

    failures: list[BaseException] = []
    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    large_storage.node.check_integrity()
    assert large_storage.node.stats().chunks == 24
