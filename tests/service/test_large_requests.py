"""Large requests wait for each other, small ones for nobody; what a client leaves behind is bounded."""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_cluster import slices
from kvstore_codec.errors import AbandonedRequestError, BusyError
from kvstore_codec.geometry import Geometry
from kvstore_codec.model_spec import KVDtype
from kvstore_service import large_requests, unsent_answers
from kvstore_service.grpc_server import MAX_CALLS_OF_CONNECTION
from kvstore_service.large_requests import MAX_WAITING, MAX_WAITING_OF_PEER, SMALL_BYTES, LargeRequests
from kvstore_service.request_fields import MAX_FIELDS
from tests.sample_chunk import sample_chunk
from tests.service.conftest import ServedNode, deaf, served, verified
from tests.service.storage_calls import ref, statuses, steps, wait_until

LARGE = SMALL_BYTES + 1
MANY_FRAMES = Geometry(layers=1024, kv_heads=1, head_dim=1, dtype=KVDtype.BFLOAT16, period_layers=1)
"""Of a chunk with a header of 49 KB."""
ATTACK = Path(__file__).parents[2] / "benchmarks" / "hostile_requests.py"


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(64) as pool:
        yield pool


def hold(large: LargeRequests, peer: str, until: threading.Event) -> bool:
    with large.admitted(peer, lambda: True, size_bytes=LARGE):
        return until.wait(60)


def waiting(large: LargeRequests) -> int:
    return len(large._queue)


def test_large_requests_are_served_one_at_a_time_in_order_and_small_ones_at_once(
    pool: ThreadPoolExecutor,
) -> None:
    large, served_peers, go_on = LargeRequests(), [], threading.Event()

    def serve(peer: str) -> None:
        with large.admitted(peer, lambda: True, size_bytes=LARGE):
            served_peers.append(peer)
            go_on.wait(60)

    calls = []
    for number in range(4):
        calls.append(pool.submit(serve, str(number)))
        wait_until(lambda: waiting(large) == len(calls))
    with large.admitted("0", lambda: True, size_bytes=SMALL_BYTES):
        assert served_peers == ["0"]
    go_on.set()
    for call in calls:
        call.result()
    assert served_peers == ["0", "1", "2", "3"]
    assert waiting(large) == 0


def test_neither_one_connection_nor_all_may_queue_many_large_requests(pool: ThreadPoolExecutor) -> None:
    large, go_on = LargeRequests(), threading.Event()
    calls = [pool.submit(hold, large, "greedy", go_on) for _ in range(MAX_WAITING_OF_PEER + 1)]
    wait_until(lambda: waiting(large) == len(calls))
    with pytest.raises(BusyError, match="send smaller requests"):
        hold(large, "greedy", go_on)
    calls += [pool.submit(hold, large, str(number), go_on) for number in range(MAX_WAITING + 1 - len(calls))]
    wait_until(lambda: waiting(large) == MAX_WAITING + 1)
    with pytest.raises(BusyError, match="large requests are already being served or wait"):
        hold(large, "another", go_on)
    go_on.set()
    assert all(call.result() for call in calls)


def test_whoever_waits_too_long_or_for_nobody_is_let_go(
    pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    large, go_on = LargeRequests(), threading.Event()
    first = pool.submit(hold, large, "first", go_on)
    wait_until(lambda: waiting(large) == 1)
    with pytest.raises(AbandonedRequestError), large.admitted("gone", lambda: False, size_bytes=LARGE):
        pass
    monkeypatch.setattr(large_requests, "PATIENCE_S", 0.2)
    with pytest.raises(BusyError, match="try again later"):
        hold(large, "impatient", go_on)
    go_on.set()
    assert first.result()
    assert waiting(large) == 0


def test_a_request_waits_for_one_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for another behind itself, and only while it is served."""
    monkeypatch.setattr(large_requests, "PATIENCE_S", 0.2)
    large = LargeRequests()
    for size_bytes in (SMALL_BYTES, LARGE):
        with large.admitted("one", lambda: True, size_bytes=size_bytes):
            for _ in range(2):
                large.wait_for_turn()
                assert waiting(large) == 1
        assert waiting(large) == 0
    with pytest.raises(RuntimeError):
        large.wait_for_turn()


def test_large_requests_that_are_kept_are_bounded() -> None:
    large = LargeRequests()
    half = large_requests.MAX_KEPT_BYTES_OF_PEER // 2
    with large.kept("one", size_bytes=half), large.kept("one", size_bytes=half):
        with pytest.raises(BusyError), large.kept("one", size_bytes=LARGE):
            pass
        with large.kept("one", size_bytes=SMALL_BYTES), large.kept("other", size_bytes=LARGE):
            pass
    with large.kept("one", size_bytes=2 * half):
        pass


def test_a_small_request_with_a_large_answer_waits_for_its_turn(pool: ThreadPoolExecutor) -> None:
    """And has no header in memory before."""
    large, go_on = LargeRequests(), threading.Event()
    chunk = sample_chunk(frame_bytes=1, geometry=MANY_FRAMES)
    lookup = pb.LookupRequest(encodings=["exact-zstd"], with_headers=True, lease_ms=60_000)
    with served(4 << 20, large) as node:
        statuses(node, steps(chunk))
        first = pool.submit(hold, large, "another", go_on)
        wait_until(lambda: waiting(large) == 1)
        lookup.chunks.extend([ref(chunk)] * 40)
        calls = [node.stub.Lookup.future(lookup) for _ in range(MAX_WAITING_OF_PEER + 1)]
        wait_until(lambda: waiting(large) == 1 + len(calls))
        with pytest.raises(grpc.RpcError) as refusal:
            node.stub.Lookup(lookup)
        assert refusal.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert node.node.stats().leases == len(calls)
        assert len(node.stub.Lookup(pb.LookupRequest(chunks=lookup.chunks[:1])).answers) == 1
        go_on.set()
        assert first.result()
        for call in calls:
            headers = {answer.header for answer in call.result().answers}
            assert headers == {chunk.data[: chunk.header.header_bytes]}
    assert waiting(large) == 0


def many(count: int) -> pb.LookupRequest:
    return pb.LookupRequest(
        chunks=[ref(sample_chunk())] * count, encodings=["exact-zstd"], with_headers=True, lease_ms=60_000
    )


def test_a_large_lookup_of_a_client_that_has_gone_leases_nothing(
    storage: ServedNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    statuses(storage, steps(sample_chunk()))
    monkeypatch.setattr(slices, "PAUSE_S", 0.3)  # between two of its ten slices
    call = storage.stub.Lookup.future(many(20_000))
    wait_until(lambda: storage.node.stats().leases == 1)
    call.cancel()
    wait_until(lambda: storage.node.stats().leases == 0)


def call(storage: ServedNode, method: str, request: bytes) -> object:
    name = f"/kvstore.v1.Storage/{method}"
    if method == "Read":
        return list(storage.channel.unary_stream(name)(request))
    return storage.channel.unary_unary(name)(request)


@pytest.mark.parametrize("method", ["Lookup", "Delete", "Report", "Read", "Stats"])
def test_millions_of_empty_fields_are_refused_before_they_are_parsed(
    storage: ServedNode, method: str
) -> None:
    with pytest.raises(grpc.RpcError) as refusal:
        call(storage, method, b"\x0a\x00" * (MAX_FIELDS + (1 << 18)))
    assert refusal.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "send smaller requests" in refusal.value.details()


@pytest.mark.parametrize("method", ["Lookup", "Read"])
def test_what_is_no_message_is_refused(storage: ServedNode, method: str) -> None:
    with pytest.raises(grpc.RpcError) as refusal:
        call(storage, method, b"\x0a\xff")
    assert refusal.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert f"not a {method}Request" in refusal.value.details()


def test_a_node_is_verified_by_one_client_at_a_time(storage: ServedNode) -> None:
    statuses(storage, steps(*(sample_chunk(content=number) for number in range(5))))
    with deaf(storage) as first:
        first.ask("Verify", b"")
        wait_until(lambda: len(storage.server._stalled._unread_since_s) == 1)  # with its first answer
        assert verified(storage) == grpc.StatusCode.RESOURCE_EXHAUSTED
    wait_until(lambda: verified(storage) == grpc.StatusCode.OK)


@pytest.fixture
def cancelled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The connections of calls that are cancelled because they wait with others."""
    peers: list[str] = []
    add = unsent_answers.UnsentAnswers.add

    def noted(self: unsent_answers.UnsentAnswers, context: grpc.ServicerContext, answer_bytes: int) -> None:
        cancel = context.cancel
        context.cancel = lambda: (peers.append(context.peer()), cancel())
        add(self, context, answer_bytes)
        assert self.waiting_bytes <= unsent_answers.MAX_BYTES

    monkeypatch.setattr(unsent_answers.UnsentAnswers, "add", noted)
    return peers


@pytest.mark.parametrize("chunks", [0, 1, 20], ids=["empty", "small", "almost large"])
def test_answers_that_nobody_takes_are_bounded(
    chunks: int, cancelled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a client that asks and does not read, the oldest calls are cancelled, whatever their size; a client that reads
    notices nothing."""
    chunk = sample_chunk(frame_bytes=1, geometry=MANY_FRAMES)
    request = pb.LookupRequest(chunks=[ref(chunk)] * chunks, encodings=["exact-zstd"], with_headers=True)
    call_bytes = unsent_answers.CALL_BYTES + chunks * (chunk.header.header_bytes + 100)
    monkeypatch.setattr(unsent_answers, "MAX_BYTES_OF_PEER", 3 * call_bytes)
    with served(64 << 20) as node, deaf(node) as client:
        statuses(node, steps(chunk))
        calls = [client.ask("Lookup", request.SerializeToString()) for _ in range(8)]
        wait_until(lambda: len(client.ended) == len(calls) - 3)
        for _ in range(5):
            assert len(node.stub.Lookup(request, timeout=60).answers) == chunks
        assert len(cancelled) == len(client.ended) == len(calls) - 3


def test_a_connection_has_few_open_calls(storage: ServedNode) -> None:
    """Those whose answer was not taken are open."""
    with deaf(storage) as client:
        calls = [client.ask("Lookup", b"") for _ in range(MAX_CALLS_OF_CONNECTION + 20)]
        wait_until(lambda: client.ended == set(calls[MAX_CALLS_OF_CONNECTION:]))
        assert storage.stub.Stats(pb.StatsRequest(), timeout=60).leases == 0


def test_the_unread_answers_of_all_connections_are_bounded(
    cancelled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls of whichever connection has most are cancelled."""
    monkeypatch.setattr(unsent_answers, "MAX_BYTES", 8 * unsent_answers.CALL_BYTES)
    request = pb.LookupRequest().SerializeToString()
    with served(4 << 20) as node, deaf(node) as modest, deaf(node) as greedy:
        modest.ask("Lookup", request)
        for _ in range(20):
            greedy.ask("Lookup", request)
        wait_until(lambda: len(greedy.ended) >= 20 - 7)
        assert node.stub.Lookup(pb.LookupRequest(), timeout=60) is not None
        assert not modest.ended
        assert len(set(cancelled)) == 1


ATTACKS = ["headers", "contexts", "misses", "empty", "delete", "report", "read", "answers", "unread"]


@pytest.fixture(scope="module")
def reports() -> dict[str, dict[str, Any]]:
    """What one node and its client went through in each attack, one after the other."""
    ran = subprocess.run(
        [sys.executable, ATTACK, "--seconds", "4"],
        check=True,
        capture_output=True,
        text=True,
        timeout=800,
    )
    return {report["attack"]: report for report in json.loads(ran.stdout)}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("attack", ATTACKS)
def test_a_well_behaved_client_is_served_during_an_attack(
    reports: dict[str, dict[str, Any]], attack: str
) -> None:
    """Within the time that clients wait for a lookup at most; how fast it is depends on the machine."""
    report = reports[attack]
    assert report["answers"]["sent"] >= report["attackers"]
    for call in ("lookup", "read"):
        assert report["attacked"][call]["failed"] == 0
        assert report["attacked"][call]["calls"] >= 5
    assert report["busy_after_s"] < 5
    assert report["rss_growth_mib"] < 1024
