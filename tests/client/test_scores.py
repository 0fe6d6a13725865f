"""Reports of attention: one call per node, bounded, and only for the tenant's own chunks."""

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from kvstore_client import KVStoreClient, connect, scores
from kvstore_client.new_chunk import NewChunk
from kvstore_codec.identity import ChunkId
from tests.client.chunks import SPEC, ids, random_kv
from tests.client.conftest import ServedCluster, served_cluster

DOCUMENT = ids(6)
PATIENCE_S = 10.0


class Heard:
    """What the nodes apply to their eviction policies: (node, chunk, score)."""

    def __init__(self, cluster: ServedCluster, monkeypatch: pytest.MonkeyPatch, expected: int) -> None:
        self.calls: list[tuple[str, Sequence[ChunkId], Sequence[float], str]] = []
        self.whole = threading.Event()
        self._expected = expected
        for node in cluster.nodes:
            monkeypatch.setattr(node, "report", self._noting(node.node_id, node.report))

    def _noting(self, node_id: str, report: object) -> object:
        def note(chunks: Sequence[ChunkId], shares: Sequence[float], tenant: str = "") -> None:
            report(chunks, shares, tenant)  # type: ignore[operator]
            self.calls.append((node_id, chunks, shares, tenant))
            if len(self.calls) == self._expected:
                self.whole.set()

        return note


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[ServedCluster]:
    with served_cluster(tmp_path, nodes=2) as served:
        yield served


def put(client: KVStoreClient) -> None:
    new = [NewChunk(chunk_id, lambda i=i: random_kv(i)) for i, chunk_id in enumerate(DOCUMENT)]  # type: ignore[misc]
    assert client.store.put(SPEC, new).result(20) == len(DOCUMENT)


def test_each_node_hears_of_its_chunks_in_one_call(
    cluster: ServedCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    with connect(cluster.address, tenant="red") as client:
        put(client)
        heard = Heard(cluster, monkeypatch, expected=2)
        assert client.report({chunk_id: index / 4 for index, chunk_id in enumerate(DOCUMENT)})
        assert heard.whole.wait(PATIENCE_S)
    found: dict[ChunkId, float] = {}
    for _, chunks, shares, _ in heard.calls:
        found |= dict(zip(chunks, shares, strict=True))
    assert found == {chunk_id: min(index / 4, 1.0) for index, chunk_id in enumerate(DOCUMENT)}
    assert {node_id for node_id, *_ in heard.calls} == {"node-0", "node-1"}
    assert {tenant for *_, tenant in heard.calls} == {"red"}


def test_what_no_number_says_is_left_out_and_a_long_report_is_cut(
    cluster: ServedCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scores, "MOST_CHUNKS", 2)
    with connect(cluster.address) as client:
        heard = Heard(cluster, monkeypatch, expected=1)
        owner = {chunk_id: client._view.writers([chunk_id.content_id])[0][0].node_id for chunk_id in DOCUMENT}
        one_node = [chunk_id for chunk_id in DOCUMENT if owner[chunk_id] == owner[DOCUMENT[0]]]
        shares = dict.fromkeys(one_node, float("nan")) | dict(zip(one_node, (0.1, 0.3, 0.2), strict=False))
        assert client.report(shares)
        assert heard.whole.wait(PATIENCE_S)
    [(_, chunks, told, _)] = heard.calls
    known = sorted((share for share in shares.values() if share == share), reverse=True)[:2]
    assert [round(share, 5) for share in told] == known
    assert [shares[chunk_id] for chunk_id in chunks] == known


def test_nothing_waits_for_reports_that_no_node_takes(
    cluster: ServedCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scores, "_MOST_CALLS", 3)
    gate = threading.Event()
    for node in cluster.nodes:
        monkeypatch.setattr(node, "report", lambda *_: gate.wait(PATIENCE_S))
    with connect(cluster.address) as client:
        sent = [client.report(dict.fromkeys(DOCUMENT, 0.5)) for _ in range(5)]
        gate.set()
    assert sent[0]
    assert not sent[-1]
    assert not client.report(dict.fromkeys(DOCUMENT, 0.5))  # closed


def test_an_unreachable_cluster_is_no_error() -> None:
    with connect("127.0.0.1:1", lookup_timeout_s=0.2) as client:
        assert not client.report(dict.fromkeys(DOCUMENT, 0.5))
        assert not client.report({})
