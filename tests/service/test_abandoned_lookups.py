"""A lookup whose client does not get the answer leases nothing."""

import threading
from collections.abc import Callable, Sequence

import grpc
import pytest

from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_cluster.lookup import LookupResult
from kvstore_service import grpc_storage
from tests.sample_chunk import SampleChunk, sample_chunk
from tests.service.conftest import ServedNode
from tests.service.storage_calls import ref, statuses, steps, wait_until

CHUNK = sample_chunk()
PATIENCE_S = 10


def request(chunk: SampleChunk) -> pb.LookupRequest:
    return pb.LookupRequest(chunks=[ref(chunk)], encodings=[chunk.encoding], lease_ms=60_000)


def serialising(monkeypatch: pytest.MonkeyPatch, first: Callable[[], object]) -> None:
    """Has something done first whenever a reply is serialised."""
    make = grpc_storage.lookup_reply

    def after(chunks: Sequence[pb.ChunkRef], result: LookupResult, bulk_endpoint: str) -> bytes:
        first()
        return make(chunks, result, bulk_endpoint)

    monkeypatch.setattr(grpc_storage, "lookup_reply", after)


def test_a_client_that_goes_while_its_answer_is_made_leases_nothing(
    storage: ServedNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    statuses(storage, steps(CHUNK))
    leased, gone = threading.Event(), threading.Event()

    def wait() -> None:
        leased.set()
        gone.wait(PATIENCE_S)

    serialising(monkeypatch, wait)
    call = storage.stub.Lookup.future(request(CHUNK))
    assert leased.wait(PATIENCE_S)
    assert storage.node.stats().leases == 1
    call.cancel()
    wait_until(lambda: storage.stub.Stats(pb.StatsRequest()).leases == 1)  # the server has heard of it since
    gone.set()
    wait_until(lambda: storage.node.stats().leases == 0)


def test_an_answer_that_cannot_be_made_leases_nothing(
    storage: ServedNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    statuses(storage, steps(CHUNK))

    def fail() -> None:
        raise MemoryError

    serialising(monkeypatch, fail)
    with pytest.raises(grpc.RpcError):
        storage.stub.Lookup(request(CHUNK))
    assert storage.node.stats().leases == 0


def test_an_answer_that_is_taken_keeps_its_lease(storage: ServedNode) -> None:
    statuses(storage, steps(CHUNK))
    reply = storage.stub.Lookup(request(CHUNK))
    assert reply.answers[0].encoding == CHUNK.encoding
    assert storage.node.stats().leases == 1
    assert storage.stub.ReleaseLease(pb.ReleaseLeaseRequest(lease_id=reply.lease_id)).released
