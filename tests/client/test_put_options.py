"""What a client says of the chunks that it stores."""

from pathlib import Path

from kvstore_client import connect
from kvstore_client.store import NewChunk
from tests.client.chunks import SPEC, ids, random_kv
from tests.client.conftest import served_cluster


def test_nodes_are_told_how_chunks_are_to_be_kept(tmp_path: Path) -> None:
    with (
        served_cluster(tmp_path) as cluster,
        connect(cluster.address, tenant="alice", ttl_s=100, put_durability="memory") as client,
    ):
        chunks = [NewChunk(id_, lambda: random_kv(0), cost=300.0) for id_ in ids(2)]
        assert client.store.put(SPEC, chunks).result(timeout=10) == 2
        stored, _ = cluster.nodes[0].list()
        assert [(s.tenant, s.cost) for s in stored] == [("alice", 300.0)] * 2
        assert all(90 < s.ttl_left_s <= 100 for s in stored)


def test_a_put_that_cannot_be_durable_is_refused(tmp_path: Path) -> None:
    with served_cluster(tmp_path) as cluster, connect(cluster.address, put_durability="durable") as client:
        assert client.store.put(SPEC, [NewChunk(ids(1)[0], lambda: random_kv(0))]).result(timeout=10) == 0
        assert client.metrics.snapshot()["miss_store_not_durable"] == 1
