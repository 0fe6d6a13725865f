"""Texts that nodes have no room for, and what lookups count, over real gRPC servers."""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch

from kvstore_client import connect
from kvstore_client.client import KVStoreClient
from kvstore_client.new_chunk import NewChunk
from kvstore_codec.identity import ChunkId
from kvstore_codec.model_spec import KVDtype, ModelSpec, RopeSpec
from tests.client.conftest import ServedCluster, served_cluster

SPEC = ModelSpec("m", bytes(32), 5, 2, 32, KVDtype.FLOAT32, RopeSpec("default", 1e4, 32))
CHUNK_MIB = 0.63  # as it lies in memory, whole blocks
KV = torch.randn(2, 5, 2, 256, 32)


def text(client: KVStoreClient, seed: int, chunks: int) -> list[ChunkId]:
    tokens = torch.randint(0, 500, (chunks * 256,), generator=torch.Generator().manual_seed(seed))
    return client.chunk_ids(SPEC, tokens)


class Put:
    """Stores chunks and counts which of them were gathered to be encoded."""

    def __init__(self, client: KVStoreClient) -> None:
        self._client = client
        self.gathered = 0

    def __call__(self, ids: Sequence[ChunkId], of: Sequence[ChunkId] = (), document: int = 0) -> int:
        chunks = [NewChunk(chunk_id, self._gather, document=document) for chunk_id in ids]
        return self._client.store.put(SPEC, chunks, text=of).result()

    def _gather(self) -> tuple[torch.Tensor, torch.Tensor]:
        self.gathered += 1
        return KV[0], KV[1]


def found(client: KVStoreClient, ids: Sequence[ChunkId]) -> int:
    match = client.match(SPEC, ids)
    client.release(match)
    return len(match.chunks)


def eventually(condition: Callable[[], bool]) -> bool:
    """Nodes are told what is used without waiting for it."""
    until_s = time.monotonic() + 30
    while not condition() and time.monotonic() < until_s:
        time.sleep(0.01)
    return condition()


def counted(cluster: ServedCluster, name: str) -> int:
    return sum(node.stats().counters[name] for node in cluster.nodes)


@pytest.fixture(params=[False, True], ids=["grpc", "bulk"])
def small(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ServedCluster]:
    with served_cluster(tmp_path, memory_bytes=8 << 20, bulk=request.param) as served:
        yield served
        served.check_nothing_is_held()


def test_of_a_text_beyond_memory_the_beginning_is_found_again_and_again(small: ServedCluster) -> None:
    with connect(small.address, fetch_policy="fixed") as client:
        put, ids = Put(client), text(client, 1, 60)
        stored = put(ids)
        assert 8 <= stored <= 14
        assert found(client, ids) == stored
        encoded = put.gathered
        # What was on its way when the first refusal came was encoded in vain, and no more.
        assert encoded < 60
        for _ in range(3):
            assert put(ids[stored:], of=ids) == 0
            assert found(client, ids) == stored
        misses = client.metrics.snapshot()["miss_store_text_cut"]
        assert misses == 60 + 3 * (60 - stored) - stored
        assert counted(small, "evictions") == 0


def test_a_lookup_that_gave_no_token_counts_no_hit_and_keeps_nothing(small: ServedCluster) -> None:
    with connect(small.address, fetch_policy="fixed") as client:
        put, ids, short = Put(client), text(client, 1, 10), text(client, 2, 6)
        assert put(ids[1:], of=ids) == 9
        for _ in range(5):
            assert found(client, ids) == 0
        assert eventually(lambda: counted(small, "unusable") == 45)
        assert (counted(small, "hits"), counted(small, "hit_tokens")) == (0, 0)
        assert client.metrics.snapshot().get("tokens_matched", 0) == 0
        assert put(short) == 6
        assert found(client, short) == 6
        assert eventually(lambda: counted(small, "hit_tokens") == 6 * 256)
        assert counted(small, "hits") == 6
        assert client.metrics.snapshot()["tokens_matched"] == 6 * 256


def test_a_look_without_use_changes_nothing(small: ServedCluster) -> None:
    with connect(small.address, fetch_policy="fixed") as client:
        put, ids = Put(client), text(client, 1, 5)
        put(ids)
        before = small.nodes[0].stats().counters
        match = client.match(SPEC, ids, peek=True)
        assert (len(match.chunks), match.leases) == (5, ())
        assert small.nodes[0].stats().leases == 0
        assert small.nodes[0].stats().counters == before
        assert "chunks_matched_exact" not in client.metrics.snapshot()


def test_a_look_at_segments_changes_nothing_either(small: ServedCluster) -> None:
    """Also where chunks are found in another context, and where nothing is found."""
    with connect(small.address, fetch_policy="fixed") as client:
        tokens = torch.randint(0, 500, (3 * 256,), generator=torch.Generator().manual_seed(9)).tolist()
        Put(client)(client.chunk_ids(SPEC, tokens))
        moved = client.segment_chunks(SPEC, [7] * 10 + tokens, [10, 256, 256, 256])
        before, counted_before = small.nodes[0].stats(), client.metrics.snapshot()
        match = client.match_segments(SPEC, moved, peek=True)
        assert [(chunk.exact, chunk.first_token) for chunk in match.chunks] == [
            (False, 10), (False, 266), (False, 522),
        ]  # fmt: skip
        assert client.match(SPEC, text(client, 10, 3), peek=True).why_not == "not stored"
        assert match.leases == ()
        assert small.nodes[0].stats() == before
        assert client.metrics.snapshot() == counted_before


@pytest.mark.parametrize("peek", [False, True])
def test_a_look_keeps_nothing_from_eviction(small: ServedCluster, peek: bool) -> None:
    """Of two texts the one that was used last stays, however often somebody looks at the other one."""
    with connect(small.address, fetch_policy="fixed") as client:
        put, first, second = Put(client), text(client, 1, 4), text(client, 2, 4)

        def left(ids: Sequence[ChunkId]) -> int:
            return len(client.match(SPEC, ids, peek=True).chunks)

        assert put(first) == put(second) == 4
        for _ in range(5):
            client.release(client.match(SPEC, first, peek=peek))
        assert eventually(lambda: counted(small, "hits") == (0 if peek else 20))
        for seed in (3, 4):
            assert put(text(client, seed, 4)) == 4
        assert counted(small, "evictions") > 0
        assert (left(first) == 4, left(second) == 4) == (not peek, peek)


def test_documents_are_cut_apart(small: ServedCluster) -> None:
    """What does not fit of one document is left out; the next one is a text of its own."""
    with connect(small.address, fetch_policy="fixed") as client:
        put, long, other = Put(client), text(client, 1, 40), text(client, 2, 3)
        chunks = [NewChunk(chunk_id, put._gather, document=1) for chunk_id in long]
        chunks += [NewChunk(chunk_id, put._gather, document=2) for chunk_id in other]
        client.store.put(SPEC, chunks).result()
        assert found(client, other) == 3
        assert 4 <= found(client, long) < 12


@pytest.mark.parametrize("replicas", [1, 2])
def test_over_several_nodes_the_beginning_stays(tmp_path: Path, replicas: int) -> None:
    """Each node sees only some chunks of a text."""
    with (
        served_cluster(tmp_path, nodes=3, memory_bytes=8 << 20, replicas=replicas, bulk=True) as cluster,
        connect(cluster.address, fetch_policy="fixed") as client,
    ):
        put, ids = Put(client), text(client, 1, 80)
        put(ids)
        first = found(client, ids)
        room = 3 * (8 / CHUNK_MIB)
        # At the end one of its owners may have a chunk that the others have no room for.
        assert 0.5 * room / replicas < first < room
        for _ in range(2):
            put(ids[first:], of=ids)
            assert found(client, ids) >= first
        assert put.gathered < 3 * 80
        assert counted(cluster, "evictions") <= 10
        for node in cluster.nodes:
            node.check_integrity()
