"""Puts over a real connection, with the generated client: what any client may rely on."""

import queue

import grpc
import pytest

from kvstore_api.v1 import kvstore_pb2 as pb
from tests.sample_chunk import sample_chunk
from tests.service.conftest import ServedNode
from tests.service.storage_calls import END, REVOKE, data, ref, start, statuses, steps, wait_until


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
        replies, ["damaged", "announced as", f"but has {len(good.data)}", "has more", "0 bytes"], strict=False
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


def test_what_a_put_says_of_its_chunk_is_listed(storage: ServedNode) -> None:
    chunk, other = sample_chunk(), sample_chunk(content=1)
    first = start(chunk)
    first.start.tenant, first.start.ttl_s, first.start.cost = "acme", 100, 12.5
    assert statuses(storage, [first, *data(chunk), END, *steps(other)]) == [pb.PUT_STATUS_STORED] * 2
    storage.node.set_pins({"": {other.chunk_id}})
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


def test_a_start_inside_a_put_is_refused_and_frees_the_first(storage: ServedNode) -> None:
    with pytest.raises(grpc.RpcError) as refusal:
        statuses(storage, [start(sample_chunk()), start(sample_chunk(content=1))])
    assert refusal.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert storage.node.stats().bytes_used == 0
