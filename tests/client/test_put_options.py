"""What a client says of the chunks that it stores."""

from pathlib import Path

from kvstore_client import connect
from kvstore_client.new_chunk import NewChunk
from tests.client.chunks import SPEC, ids, random_kv
from tests.client.conftest import served_cluster


def test_nodes_are_told_how_chunks_are_to_be_kept(tmp_path: Path) -> None:
    with (
        served_cluster(tmp_path) as cluster,
        connect(cluster.address, tenant="alice", ttl_s=100, put_durability="memory") as client,
    ):
        chunks = [NewChunk(id_, lambda: random_kv(0), cost=300.0) for id_ in ids(2)]
        assert client.store.put(SPEC, chunks).result(timeout=60) == 2
        stored, _ = cluster.nodes[0].list()
        assert [(s.tenant, s.cost) for s in stored] == [("alice", 300.0)] * 2
        assert all(90 < s.ttl_left_s <= 100 for s in stored)


def test_a_put_that_cannot_be_durable_is_refused(tmp_path: Path) -> None:
    with served_cluster(tmp_path) as cluster, connect(cluster.address, put_durability="durable") as client:
        assert client.store.put(SPEC, [NewChunk(ids(1)[0], lambda: random_kv(0))]).result(timeout=60) == 0
        assert client.metrics.snapshot()["miss_store_not_durable"] == 1


def test_nodes_are_told_the_place_of_chunks_whose_text_is_named_in_part(tmp_path: Path) -> None:
    """As by an engine that stores a long text as it grows."""
    with served_cluster(tmp_path) as cluster, connect(cluster.address) as client:
        text = ids(12)
        for begin, end in ((0, 4), (4, 8), (8, 12)):
            chunks = [NewChunk(id_, lambda: random_kv(0)) for id_ in text[begin:end]]
            named = text[max(0, begin - 2) : end]
            stored = client.store.put(SPEC, chunks, text=named, text_begins=max(0, begin - 2))
            assert stored.result(timeout=60) == 4
        listed, _ = cluster.nodes[0].list()
        places = {variant.chunk_id: (variant.number, variant.behind) for variant in listed}
        assert places == {id_: (number, tuple(text[:number][::-1])) for number, id_ in enumerate(text)}
