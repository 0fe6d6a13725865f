"""Nodes that are slow, silent or wrong, and what a client makes of each."""

import math
import time
import weakref
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import grpc
import numpy as np
import pytest

from kvstore_api.bulk import ReadPiece
from kvstore_api.placement import Member, Placement
from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_bench.shaping import ShapedLink
from kvstore_client import KVStoreClient, connect
from kvstore_client.new_chunk import NewChunk
from kvstore_client.owner_write import OutgoingChunk, OwnerWrite
from kvstore_client.transport import GrpcTransport, ReadStream
from kvstore_codec.identity import chunk_ids
from kvstore_codec.model_spec import RopeSpec
from tests.client.changed_settings import changed
from tests.client.chunks import SPEC, ids, random_kv
from tests.client.conftest import served_cluster
from tests.client.test_replicas import CHUNKS, PATIENCE, PROMPT_S, Replicated, put, replicated

__all__ = ["replicated"]


def test_who_was_asked_only_a_moment_ago_is_not_blamed(tmp_path: Path) -> None:
    """One owner is silent, the other one answers, and the third reader, asked at the same time, is far away."""
    document = ids(CHUNKS)
    with served_cluster(tmp_path, nodes=3, replicas=2) as cluster, ExitStack() as opened:
        with connect(cluster.address) as writer:
            put(writer, document)
        row = Placement(cluster.books.membership().members, 2).readers([document[0].content_id])[0]
        links = {
            member.endpoint: opened.enter_context(
                ShapedLink(member.endpoint, bandwidth_bps=10e9, latency_s=0.1 * (member == row[2]))
            )
            for member in row
        }
        routes = {endpoint: link.address for endpoint, link in links.items()}
        client = opened.enter_context(connect(cluster.address, routes=routes, **PATIENCE))
        links[row[0].endpoint].cut()
        match = client.match(SPEC, document[:1])
        assert [chunk.member.node_id for chunk in match.chunks] == [row[1].node_id]
        assert [client._view.is_paused(member.endpoint) for member in row] == [True, False, False]
        client.release(match)


def test_a_slow_node_is_asked_when_the_other_owner_is_gone(tmp_path: Path) -> None:
    document = ids(4)
    with (
        served_cluster(tmp_path, nodes=2, replicas=2) as cluster,
        connect(cluster.address, **PATIENCE) as client,
    ):
        put(client, document)
        client._view.pause(cluster.servers[1].address)  # as after a put that stalled
        cluster.stop_node(0)
        for _ in range(2):
            match = client.match(SPEC, document)
            assert [chunk.member.node_id for chunk in match.chunks] == ["node-1"] * 4
            client.release(match)


def test_a_silent_bulk_port_is_waited_for_once(
    replicated: Replicated, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The node's lookups are answered."""
    match = replicated.match()
    silent = replicated.busiest(match)
    if len(replicated.cables[silent].links) == 1:
        pytest.skip("this node has no bulk port")
    replicated.cables[silent].links[1].cut()
    replicated.fetch(match)
    assert replicated.counted("failover_silent") == 1
    read_from = replicated.carriers(monkeypatch)
    replicated.fetch(replicated.match())
    assert read_from == {"node-0", "node-1", "node-2"} - {f"node-{silent}"}
    assert replicated.counted("failover_silent") == 1


def test_a_fetch_does_not_look_for_others_beyond_its_deadline(replicated: Replicated) -> None:
    hasty = changed(replicated.client.settings, fetch_timeout_s=0.6, stall_timeout_s=0.5, failover_s=0.2)
    with KVStoreClient(hasty) as client:
        match = client.match(SPEC, replicated.document)
        for cable in replicated.cables:
            cable.cut()
        started = time.monotonic()
        report = client.fetch(match, client.buffers.acquire(SPEC, match.tokens), None).wait()
        assert time.monotonic() - started < PROMPT_S  # a lookup's own deadline is later
        assert not report.complete
        for cable in replicated.cables:
            cable.restore()


def test_owners_that_are_silent_are_waited_for_together(replicated: Replicated) -> None:
    for cable in replicated.cables:
        cable.cut()
    stall_s = 3.0
    patient = changed(replicated.client.settings, put_stall_timeout_s=stall_s)
    with KVStoreClient(patient) as client:
        started = time.monotonic()
        assert put(client, ids(6, seed=3)) == 0
        # One after the other, they would take three times `stall_s`.
        assert time.monotonic() - started < 2 * stall_s
        assert client.metrics.snapshot()["miss_store_stalled"] == 3


def test_a_failed_owner_keeps_no_chunks() -> None:
    with grpc.insecure_channel("127.0.0.1:1") as channel:
        write = OwnerWrite(GrpcTransport(channel), timeout_s=5, stall_s=5)
        kept = []
        for _ in range(20):
            data = np.zeros(1 << 20, np.uint8)
            kept.append(weakref.ref(data))
            write.put(OutgoingChunk(pb.PutStart(size_bytes=len(data)), (data.data,)))
            del data
        write.complete()
        write.finish()
        assert write.failure == "unreachable"
        assert sum(data() is not None for data in kept) <= 1  # the one it was at


def test_a_node_that_sends_a_piece_too_many_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Generous:
        moved_at_s = -math.inf
        incomplete_bytes = 0

        def __init__(self, stream: ReadStream, ranges: int) -> None:
            self._stream, self._ranges = stream, ranges

        def __iter__(self) -> Iterator[ReadPiece]:
            yield from self._stream
            yield ReadPiece(self._ranges, memoryview(b"x"))

        def cancel(self) -> None:
            self._stream.cancel()

    read = GrpcTransport.read
    monkeypatch.setattr(
        GrpcTransport, "read", lambda self, request, s: Generous(read(self, request, s), len(request.ranges))
    )
    document = ids(3)
    with served_cluster(tmp_path) as cluster, connect(cluster.address, **PATIENCE) as client:
        put(client, document)
        for _ in range(5):
            match = client.match(SPEC, document)
            buffers = client.buffers.acquire(SPEC, match.tokens)
            assert client.fetch(match, buffers, None).wait().complete


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_slow_link_is_not_a_silent_one(tmp_path: Path, replicas: int) -> None:
    """A range takes longer than `failover_s` and `stall_timeout_s`, but its bytes keep coming."""
    spec = replace(SPEC, layers=4, kv_heads=8, head_dim=64, rope=RopeSpec("default", 10000.0, 64, ()))
    document = chunk_ids(spec.digest, b"", list(range(256)))
    patience = PATIENCE | {"failover_s": 1.0, "stall_timeout_s": 1.2}
    with served_cluster(tmp_path, nodes=2, replicas=replicas, bulk=True) as cluster, ExitStack() as opened:
        with connect(cluster.address) as writer:
            chunk = NewChunk(document[0], lambda: random_kv(1, spec))
            assert writer.store.put(spec, [chunk]).result(timeout=60) == 1
        routes = {}
        for address in [s.address for s in cluster.servers] + [s.address for s in cluster.bulk]:
            link = opened.enter_context(ShapedLink(address, bandwidth_bps=4e6))
            routes[address] = link.address
        client = opened.enter_context(connect(cluster.address, routes=routes, **patience))
        match = client.match(spec, document)
        report = client.fetch(match, client.buffers.acquire(spec, match.tokens), None).wait()
        assert report.complete, report
        assert "failover_silent" not in client.metrics.snapshot()


@pytest.mark.parametrize("endpoint", ["127.0.0.1:http", "127.0.0.1:99999", "nowhere"])
def test_a_bulk_port_that_is_none_is_not_used(tmp_path: Path, endpoint: str) -> None:
    with served_cluster(tmp_path) as cluster:
        node = cluster.servers[0].address
        cluster.books.join(Member("node-0", node, bulk_endpoint=endpoint), 2)
        with connect(cluster.address) as client:
            assert put(client, ids(2)) == 2
            assert client.metrics.snapshot().get("miss_store_internal_error") is None
