"""Routers ask the coordinator how long a fetch would take."""

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from kvstore_api.placement import owners
from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_api.v1 import kvstore_pb2_grpc as rpc
from kvstore_service.grpc_predict import DISK_Bps
from tests.client.conftest import ServedCluster, served_cluster
from tests.cluster.disk_node import put
from tests.sample_chunk import SampleChunk, sample_chunk

CHUNKS = [sample_chunk(content=number, frame_bytes=20_000) for number in range(8)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedCluster]:
    with served_cluster(tmp_path_factory.mktemp("predict"), nodes=2, disk_bytes=64 << 20) as made:
        members = made.books.membership().members
        for chunk in CHUNKS[:6]:
            (owner,) = owners(chunk.chunk_id.content_id, members)
            put(next(node for node in made.nodes if node.node_id == owner.node_id), chunk)
        yield made


def ref(chunk: SampleChunk) -> pb.ChunkRef:
    return pb.ChunkRef(content_id=chunk.chunk_id.content_id, prefix_id=chunk.chunk_id.prefix_id)


def predict(cluster: ServedCluster, chunks: list[SampleChunk], **fields: object) -> pb.PredictReply:
    request = pb.PredictRequest(
        chunks=map(ref, chunks),
        **({"bandwidth_bps": 8_000_000} | fields),  # type: ignore[arg-type]
    )
    with grpc.insecure_channel(cluster.coordinator.address) as channel:
        return rpc.CoordinatorStub(channel).Predict(request)


def test_it_names_bytes_tier_encoding_and_seconds(cluster: ServedCluster) -> None:
    reply = predict(cluster, CHUNKS[:6], latency_us=5000)
    size_bytes = sum(len(chunk.data) for chunk in CHUNKS[:6])
    assert (reply.chunks, reply.size_bytes) == (6, size_bytes)
    assert reply.seconds == pytest.approx(0.005 + size_bytes / 1e6)
    assert {part.encoding for part in reply.parts} == {"exact-zstd"}
    assert {part.node_id for part in reply.parts} == {"node-0", "node-1"}
    assert sum(part.chunks for part in reply.parts) == 6
    assert not any(part.on_disk for part in reply.parts)


def test_only_the_beginning_counts(cluster: ServedCluster) -> None:
    assert predict(cluster, [*CHUNKS[:2], CHUNKS[7], CHUNKS[3]]).chunks == 2
    assert predict(cluster, CHUNKS[6:]) == pb.PredictReply()
    assert predict(cluster, []) == pb.PredictReply()


def test_it_counts_what_the_worker_accepts(cluster: ServedCluster) -> None:
    assert predict(cluster, CHUNKS[:6], encodings=["exact-raw"]).chunks == 0
    assert predict(cluster, CHUNKS[:6], encodings=["exact-raw", "exact-zstd"]).chunks == 6


def test_a_fast_link_waits_for_the_disk(cluster: ServedCluster) -> None:
    for node in cluster.nodes:
        with node._lock:
            node._memory.demote(0.0, 0.0)
    reply = predict(cluster, CHUNKS[:6], bandwidth_bps=400_000_000_000)
    assert all(part.on_disk for part in reply.parts)
    assert reply.seconds == pytest.approx(max(part.size_bytes for part in reply.parts) / DISK_Bps)


def test_asking_changes_nothing(cluster: ServedCluster) -> None:
    before = [node.stats().counters for node in cluster.nodes]
    predict(cluster, CHUNKS[:6])
    assert [node.stats().counters for node in cluster.nodes] == before
    assert not any(node.stats().leases for node in cluster.nodes)


def test_nonsense_is_refused(cluster: ServedCluster) -> None:
    for fields in ({"bandwidth_bps": 0}, {"encodings": ["exact-zstd"] * 65}):
        with pytest.raises(grpc.RpcError) as refused:
            predict(cluster, CHUNKS[:1], **fields)
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_a_long_prompt_is_answered(cluster: ServedCluster) -> None:
    assert predict(cluster, [*CHUNKS[:6], *[CHUNKS[7]] * 20_000]).chunks == 6


def test_what_a_silent_node_has_does_not_count(tmp_path: Path) -> None:
    with served_cluster(tmp_path, nodes=1) as cluster:
        put(cluster.nodes[0], CHUNKS[0])
        cluster.servers[0].stop(0)
        assert predict(cluster, CHUNKS[:1]).chunks == 0
