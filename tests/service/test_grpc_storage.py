"""The Storage service over a real connection, with the generated client: what any client may rely on."""

import queue
import threading
import time
from collections.abc import Callable, Iterator

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_codec.geometry import Geometry
from kvstore_codec.model_spec import KVDtype
from kvstore_service.grpc_server import MAX_STREAMS
from kvstore_service.grpc_storage import MAX_HEADER_BYTES
from tests.sample_chunk import SampleChunk, sample_chunk
from tests.service.conftest import ServedNode

SERVICE = "kvstore.v1.Storage"


def ref(chunk: SampleChunk) -> pb.ChunkRef:
    return pb.ChunkRef(content_id=chunk.chunk_id.content_id, prefix_id=chunk.chunk_id.prefix_id)


def start(chunk: SampleChunk, size_bytes: int | None = None) -> pb.PutRequest:
    size_bytes = len(chunk.data) if size_bytes is None else size_bytes
    return pb.PutRequest(start=pb.PutStart(chunk=ref(chunk), encoding=chunk.encoding, size_bytes=size_bytes))


def data(chunk: SampleChunk, piece_bytes: int = 5000) -> Iterator[pb.PutRequest]:
    for position in range(0, len(chunk.data), piece_bytes):
        yield pb.PutRequest(data=chunk.data[position : position + piece_bytes])


END = pb.PutRequest(end=pb.PutEnd())
REVOKE = pb.PutRequest(revoke=pb.PutRevoke())


def steps(*chunks: SampleChunk) -> Iterator[pb.PutRequest]:
    for chunk in chunks:
        yield start(chunk)
        yield from data(chunk)
        yield END


def statuses(storage: ServedNode, requests) -> list[int]:
    return [reply.status for reply in storage.stub.Put(iter(requests))]


def read(storage: ServedNode, chunks, ranges, piece_bytes: int = 0) -> dict[int, bytes]:
    """The bytes of every range that came; pieces must come in order."""
    request = pb.ReadRequest(
        chunks=[ref(chunk) for chunk in chunks],
        encodings=[chunk.encoding for chunk in chunks],
        ranges=[pb.ReadRange(chunk=c, first_frame=first, frame_count=count) for c, first, count in ranges],
        piece_bytes=piece_bytes,
    )
    parts: dict[int, bytes] = {}
    for reply in storage.stub.Read(request):
        assert list(parts) == sorted(parts)
        if reply.status == pb.READ_STATUS_OK:
            assert not piece_bytes or len(reply.data) <= piece_bytes
            parts[reply.range] = parts.get(reply.range, b"") + reply.data
        else:
            parts[reply.range] = pb.ReadStatus.Name(reply.status).encode()
    return parts


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


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


def test_what_is_stored_already_need_not_be_sent_again(storage: ServedNode) -> None:
    chunk = sample_chunk()
    assert statuses(storage, steps(chunk)) == [pb.PUT_STATUS_STORED]
    assert statuses(storage, [start(chunk), END]) == [pb.PUT_STATUS_ALREADY_STORED]
    assert statuses(storage, [start(chunk), REVOKE]) == [pb.PUT_STATUS_ALREADY_STORED]
    assert statuses(storage, steps(chunk)) == [pb.PUT_STATUS_ALREADY_STORED]


def test_a_revoked_put_leaves_nothing_and_the_stream_goes_on(storage: ServedNode) -> None:
    first, second = sample_chunk(content=1), sample_chunk(content=2)
    requests = [start(first), next(data(first)), REVOKE, *steps(second)]
    assert statuses(storage, requests) == [pb.PUT_STATUS_REVOKED, pb.PUT_STATUS_STORED]
    assert storage.node.stats().chunks == 1


def test_unsound_chunks_are_refused_one_by_one(storage: ServedNode) -> None:
    good, flipped = sample_chunk(content=1), sample_chunk(content=2)
    pieces = list(data(flipped))
    pieces[-1].data = pieces[-1].data[:-1] + bytes([pieces[-1].data[-1] ^ 1])
    foreign = [start(sample_chunk(content=3), len(good.data)), *data(good), END]
    too_short = [start(good, len(good.data) + 1), *data(good), END]
    too_long = [start(good, len(good.data) - 1), *data(good), END]
    empty = [start(good, 0), END]
    replies = list(
        storage.stub.Put(
            iter([start(flipped), *pieces, END, *foreign, *too_short, *too_long, *empty, *steps(good)])
        )
    )
    assert [reply.status for reply in replies] == [pb.PUT_STATUS_INVALID] * 5 + [pb.PUT_STATUS_STORED]
    for reply, reason in zip(
        replies, ["damaged", "announced as", "came", "has more", "0 bytes"], strict=False
    ):
        assert reason in reply.message
    assert storage.node.stats().chunks == 1


def test_chunks_that_cannot_fit_are_refused(storage: ServedNode) -> None:
    chunk = sample_chunk()
    (reply,) = storage.stub.Put(iter([start(chunk, 5 << 20), END]))
    assert (reply.status, "more memory" in reply.message) == (pb.PUT_STATUS_TOO_LARGE, True)
    (reply,) = storage.stub.Put(iter([start(chunk, 1 << 63), END]))
    assert reply.status == pb.PUT_STATUS_TOO_LARGE
    statuses(storage, steps(chunk))
    storage.stub.Lookup(pb.LookupRequest(chunks=[ref(chunk)], encodings=["exact-zstd"], lease_ms=5000))
    (reply,) = storage.stub.Put(iter([start(sample_chunk(content=1), (4 << 20) - 4096), END]))
    assert (reply.status, "leased" in reply.message) == (pb.PUT_STATUS_FULL, True)


@pytest.mark.parametrize("how", ["cancelled", "half-closed"])
def test_a_put_that_breaks_off_leaves_nothing(storage: ServedNode, how: str) -> None:
    chunk = sample_chunk()
    requests: queue.Queue = queue.Queue()
    requests.put(start(chunk))
    requests.put(next(data(chunk)))
    call = storage.stub.Put(iter(requests.get, None))
    wait_until(lambda: storage.node.stats().bytes_used > 0)
    if how == "cancelled":
        call.cancel()
    requests.put(None)
    wait_until(lambda: storage.node.stats().bytes_used == 0)
    if how == "half-closed":
        assert list(call) == []
    storage.node.check_integrity()


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


def test_what_a_put_says_of_its_chunk_is_listed(storage: ServedNode) -> None:
    chunk, other = sample_chunk(), sample_chunk(content=1)
    first = start(chunk)
    first.start.tenant, first.start.ttl_s, first.start.cost = "acme", 100, 12.5
    assert statuses(storage, [first, *data(chunk), END, *steps(other)]) == [pb.PUT_STATUS_STORED] * 2
    storage.node.set_pins({other.chunk_id})
    by_tenant = {variant.tenant: variant for variant in storage.stub.List(pb.ListRequest()).variants}
    listed = by_tenant["acme"]
    assert (listed.chunk, listed.encoding, listed.size_bytes) == (ref(chunk), "exact-zstd", len(chunk.data))
    assert (listed.cost, listed.in_memory, listed.on_disk, listed.pinned) == (12.5, True, False, False)
    assert 90 < listed.ttl_left_s <= 100
    assert (by_tenant[""].pinned, by_tenant[""].ttl_left_s) == (True, 0)
    (alone,) = storage.stub.List(pb.ListRequest(tenant="acme")).variants
    assert alone == listed
    page = storage.stub.List(pb.ListRequest(limit=1))
    assert len(page.variants) == 1
    assert len(storage.stub.List(pb.ListRequest(cursor=page.next_cursor)).variants) == 1
    prefix = chunk.chunk_id.content_id[:4]
    assert storage.stub.List(pb.ListRequest(content_prefix=prefix)).variants == [listed]


def test_durable_without_a_disk_and_above_a_quota_are_answered_by_name(storage: ServedNode) -> None:
    chunk = sample_chunk()
    durable = start(chunk)
    durable.start.durability = pb.DURABILITY_DURABLE
    assert statuses(storage, [durable, END]) == [pb.PUT_STATUS_NOT_DURABLE]
    storage.node.set_quotas({"acme": 100})
    costly = start(chunk)
    costly.start.tenant = "acme"
    assert statuses(storage, [costly, END]) == [pb.PUT_STATUS_OVER_QUOTA]
    for spoil in ({"durability": 17}, {"cost": -1.0}, {"cost": float("nan")}):
        odd = start(chunk)
        for name, value in spoil.items():
            setattr(odd.start, name, value)
        assert statuses(storage, [odd, END]) == [pb.PUT_STATUS_INVALID]


def test_one_gigabyte_is_no_chunk(storage: ServedNode) -> None:
    (reply,) = storage.stub.Put(iter([start(sample_chunk(), 1 << 30), END]))
    assert reply.status == pb.PUT_STATUS_TOO_LARGE
    assert "at most 1073741823" in reply.message


def test_a_peek_is_no_use(storage: ServedNode) -> None:
    chunk = sample_chunk()
    statuses(storage, steps(chunk))
    reply = storage.stub.Lookup(pb.LookupRequest(chunks=[ref(chunk)], encodings=["exact-zstd"], peek=True))
    assert reply.answers[0].size_bytes == len(chunk.data)
    assert storage.stub.Stats(pb.StatsRequest()).counters["lookups"] == 0


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


def test_a_start_inside_a_put_is_refused_and_frees_the_first(storage: ServedNode) -> None:
    with pytest.raises(grpc.RpcError) as refusal:
        statuses(storage, [start(sample_chunk()), start(sample_chunk(content=1))])
    assert refusal.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert storage.node.stats().bytes_used == 0


def test_messages_above_the_limit_are_refused(storage: ServedNode) -> None:
    with pytest.raises(grpc.RpcError) as refusal:
        statuses(storage, [start(sample_chunk()), pb.PutRequest(data=bytes(9 << 20)), END])
    assert refusal.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    wait_until(lambda: storage.node.stats().bytes_used == 0)


def test_unknown_encodings_are_refused_by_name(storage: ServedNode) -> None:
    chunk = sample_chunk()
    request = pb.PutRequest(start=pb.PutStart(chunk=ref(chunk), encoding="exact-magic", size_bytes=10))
    (reply,) = storage.stub.Put(iter([request, END]))
    assert (reply.status, "exact-magic" in reply.message) == (pb.PUT_STATUS_INVALID, True)


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
    time.sleep(0.05)
    with pytest.raises(grpc.RpcError) as refusal:
        storage.stub.Stats(pb.StatsRequest())
    assert refusal.value.code() == grpc.StatusCode.UNAVAILABLE
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
    assert storage.stub.Stats(pb.StatsRequest(), timeout=1).node_id == "node-0"
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
