"""A stream whose client takes no answer ends, and what it held is given back."""

import threading
from collections.abc import Iterator

import grpc
import pytest

from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_cluster.background import background_health
from kvstore_service import large_requests, stalled_streams
from kvstore_service.large_requests import LargeRequests
from kvstore_service.throttle import SLOWEST_BPS
from tests.sample_chunk import sample_chunk
from tests.service.conftest import ServedNode, deaf, served, verified
from tests.service.storage_calls import ref, start, statuses, steps, wait_until

CHUNK = sample_chunk()


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stalled_streams, "PATIENCE_S", 0.2)
    monkeypatch.setattr(stalled_streams, "_PERIOD_S", 0.05)


def test_a_verification_that_nobody_takes_lets_others_verify(storage: ServedNode) -> None:
    with deaf(storage) as client:
        call = client.ask("Verify", b"")
        wait_until(lambda: call in client.ended)
        wait_until(lambda: verified(storage) == grpc.StatusCode.OK)


def test_an_error_does_not_end_the_watch(storage: ServedNode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stalled_streams, "PATIENCE_S", None)
    wait_until(lambda: "kvstore-rpc-stalled" in background_health().failing)
    monkeypatch.setattr(stalled_streams, "PATIENCE_S", 0.2)
    with deaf(storage) as client:
        call = client.ask("Verify", b"")
        wait_until(lambda: call in client.ended)
    assert "kvstore-rpc-stalled" not in background_health().failing


def test_a_read_that_nobody_takes_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_requests, "SMALL_BYTES", 10)
    large = LargeRequests()
    request = pb.ReadRequest(chunks=[ref(CHUNK)], encodings=[CHUNK.encoding], ranges=[pb.ReadRange()] * 3)
    with served(4 << 20, large) as node, deaf(node) as client:
        statuses(node, steps(CHUNK))
        calls = {client.ask("Read", request.SerializeToString()) for _ in range(2)}
        wait_until(lambda: large._kept_bytes.total() == 2 * request.ByteSize())
        node.stub.Delete(pb.DeleteRequest(chunks=[ref(CHUNK)]))
        assert node.node.stats().bytes_used > 0
        wait_until(lambda: client.ended == calls)
        wait_until(lambda: large._kept_bytes.total() == node.node.stats().bytes_used == 0)


def test_a_put_that_never_ends_keeps_nothing(storage: ServedNode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stalled_streams, "SILENT_S", 0.2)
    ended = threading.Event()

    def endless() -> Iterator[pb.PutRequest]:
        yield start(CHUNK)
        ended.wait(60)

    call = storage.stub.Put(endless())
    wait_until(lambda: storage.node.stats().bytes_used > 0)
    wait_until(call.done)
    wait_until(lambda: storage.node.stats().bytes_used == 0)
    assert call.code() is grpc.StatusCode.CANCELLED
    ended.set()


def test_a_node_that_takes_long_itself_does_not_end_a_stream() -> None:
    """Each piece waits under a throttle for less than the client has patience, all together for longer."""
    chunk = sample_chunk(frame_bytes=200)
    with served(4 << 20, experiments=True) as storage:
        statuses(storage, steps(chunk))
        storage.stub.Throttle(pb.ThrottleRequest(bandwidth_bps=SLOWEST_BPS))
        request = pb.ReadRequest(chunks=[ref(chunk)], encodings=[chunk.encoding], ranges=[pb.ReadRange()])
        assert b"".join(reply.data for reply in storage.stub.Read(request)) == chunk.data
