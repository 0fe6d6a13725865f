"""Prompts in segments: what is found of them, exactly or in another context, and how it comes."""

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from kvstore_bench.shaping import ShapedLink
from kvstore_client import KVStoreClient, connect
from kvstore_client.fetch import FetchReport
from kvstore_client.match import Match
from kvstore_client.new_chunk import NewChunk
from kvstore_cluster.lookup import LookupAnswer, LookupResult
from kvstore_cluster.node import StorageNode
from kvstore_codec.identity import ChunkId, PlacedChunk, begins_text
from kvstore_codec.rope import RotaryTable, rotate_
from tests.client.chunks import SPEC, random_kv
from tests.client.conftest import ServedCluster, served_cluster
from tests.client.test_replicas import PATIENCE, PROMPT_S, Cable
from tests.damage import flip_bit

# On a busy machine a sound owner may be silent for longer than it should be: then the other one's answer is taken.
PATIENT: dict[str, Any] = {"lookup_timeout_s": 20.0, "failover_s": 8.0, "stall_timeout_s": 20.0}


def text(tokens: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1000, (tokens,), generator=generator).tolist()


SYSTEM, SHORT, LONG, NEW = text(256, 1), text(300, 2), text(600, 3), text(256, 4)


def placed(client: KVStoreClient, *segments: list[int]) -> list[PlacedChunk]:
    prompt = [token for segment in segments for token in segment]
    return client.segment_chunks(SPEC, prompt, [len(segment) for segment in segments])


def seed_of(chunk_id: ChunkId) -> int:
    """A chunk's KV in these tests: another in every context, as with a model."""
    return int.from_bytes(chunk_id.prefix_id[:4], "little")


def store(client: KVStoreClient, *segments: list[int]) -> list[PlacedChunk]:
    chunks = placed(client, *segments)
    new = [NewChunk(chunk.chunk_id, lambda c=chunk: random_kv(seed_of(c.chunk_id))) for chunk in chunks]  # type: ignore[misc]
    assert client.store.put(SPEC, new).result(20) == len(chunks)
    return chunks


def rotary(tokens: int) -> tuple[RotaryTable, ...]:
    """Another one for every position and layer."""
    angles = torch.outer(torch.arange(tokens).float(), torch.arange(1, SPEC.head_dim + 1) / 100)
    return tuple(RotaryTable((angles * layer).cos(), (angles * layer).sin()) for layer in range(1, 7))


def expected(match: Match, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What a fetch leaves in buffers that were full of -1."""
    keys, values = (torch.full((SPEC.layers, SPEC.kv_heads, tokens, SPEC.head_dim), -1.0) for _ in range(2))
    tables = rotary(tokens)
    for chunk in match.chunks:
        place = slice(chunk.first_token, chunk.first_token + 256)
        keys[:, :, place], values[:, :, place] = random_kv(seed_of(chunk.chunk_id))
        for layer, table in enumerate(tables):
            rotate_(keys[layer, :, place], table.at(place))
    return keys, values


def fetch(
    client: KVStoreClient,
    match: Match,
    tokens: int,
    computed: Sequence[range] = (),
    meanwhile: Callable[[], object] = lambda: None,
    **options: Any,
) -> tuple[FetchReport, torch.Tensor, torch.Tensor]:
    buffers = client.buffers.acquire(SPEC, tokens)
    buffers.keys.fill_(-1)
    buffers.values.fill_(-1)
    fetching = client.fetch(match, buffers, rotary(tokens), computed=computed, **options)
    meanwhile()
    report = fetching.wait()
    keys, values = buffers.keys.clone(), buffers.values.clone()
    client.buffers.release(buffers)
    return report, keys, values


def check(client: KVStoreClient, match: Match, tokens: int) -> None:
    report, keys, values = fetch(client, match, tokens)
    assert report.complete, report
    assert report.fetched == len(match.chunks)
    wanted_keys, wanted_values = expected(match, tokens)
    assert torch.equal(keys, wanted_keys)
    assert torch.equal(values, wanted_values)


def kinds(match: Match) -> list[tuple[int, bool]]:
    return [(chunk.first_token, chunk.exact) for chunk in match.chunks]


@pytest.fixture(params=["grpc", "bulk"])
def two_nodes(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[ServedCluster]:
    with served_cluster(tmp_path, nodes=2, bulk=request.param == "bulk") as cluster:
        yield cluster


def test_one_prompt_of_exact_approximate_and_missing_chunks(two_nodes: ServedCluster) -> None:
    with connect(two_nodes.address, **PATIENT) as client:
        stored = {c.chunk_id for c in store(client, SYSTEM, SHORT, LONG)}
        prompt = [SYSTEM, LONG, NEW, [], SHORT, text(700, 5)]
        chunks = placed(client, *prompt)
        match = client.match_segments(SPEC, chunks)
        # The system prefix, both documents at other places, and neither the new one nor the long question.
        assert kinds(match) == [(0, True), (256, False), (512, False), (1112, False)]
        assert {chunk.chunk_id for chunk in match.chunks} <= stored
        asked = {chunk.first_token: chunk.chunk_id for chunk in chunks}
        for chunk in match.chunks:
            there = asked[chunk.first_token]
            assert chunk.chunk_id.content_id == there.content_id
            assert (chunk.chunk_id == there) == chunk.exact
        counts = client.metrics.snapshot()
        assert (counts["chunks_matched_exact"], counts["chunks_matched_approximate"]) == (1, 3)
        check(client, match, sum(map(len, prompt)))
        # In the stored order everything is exact, although the first document has a tail.
        match = client.match_segments(SPEC, placed(client, SYSTEM, SHORT, LONG, text(9, 6)))
        assert kinds(match) == [(0, True), (256, True), (556, True), (812, True)]
        check(client, match, 1165)
    two_nodes.check_nothing_is_held()


def test_the_first_chunk_need_not_be_stored(two_nodes: ServedCluster) -> None:
    with connect(two_nodes.address, **PATIENT) as client:
        store(client, SYSTEM, LONG)
        match = client.match_segments(SPEC, placed(client, NEW, LONG))
        assert kinds(match) == [(256, False), (512, False)]
        check(client, match, 856)
        assert not client.match(SPEC, [chunk.chunk_id for chunk in placed(client, NEW, LONG)]).chunks
    two_nodes.check_nothing_is_held()


def test_a_document_that_is_repeated_comes_at_every_place(two_nodes: ServedCluster) -> None:
    with connect(two_nodes.address, **PATIENT) as client:
        store(client, SYSTEM, SHORT)
        prompt = [SYSTEM, SHORT, SHORT, SHORT, text(5, 7)]
        match = client.match_segments(SPEC, placed(client, *prompt))
        assert kinds(match) == [(0, True), (256, True), (556, False), (856, False)]
        assert len({chunk.chunk_id for chunk in match.chunks}) == 2
        check(client, match, sum(map(len, prompt)))
    two_nodes.check_nothing_is_held()


def test_a_context_that_begins_no_text_is_preferred(two_nodes: ServedCluster) -> None:
    with connect(two_nodes.address, **PATIENT) as client:
        store(client, SYSTEM, SHORT)
        store(client, SHORT)
        (first, second) = client.match_segments(SPEC, placed(client, NEW, SHORT, SYSTEM)).chunks
        assert not begins_text(first.chunk_id)
        assert begins_text(second.chunk_id)


def test_nothing_is_found_in_nothing(two_nodes: ServedCluster) -> None:
    with connect(two_nodes.address, **PATIENT) as client:
        assert client.segment_chunks(SPEC, [1, 2, 3], [0, 2, 0, 1]) == []
        assert client.match_segments(SPEC, []) == Match()
        assert client.match_segments(SPEC, placed(client, NEW, LONG)) == Match()
    with connect("127.0.0.1:1", **PATIENCE) as client:
        assert client.match_segments(SPEC, placed(client, NEW)) == Match()
        assert client.metrics.snapshot()["miss_unreachable"] == 1


def test_another_tenant_meets_nothing(two_nodes: ServedCluster) -> None:
    with connect(two_nodes.address, tenant_salt="one") as client:
        store(client, SYSTEM, SHORT, LONG)
    for salt in ("", "two"):
        with connect(two_nodes.address, tenant_salt=salt) as client:
            for segments in ([SYSTEM, SHORT, LONG], [NEW, LONG, SHORT, SYSTEM]):
                assert client.match_segments(SPEC, placed(client, *segments)) == Match()
    with connect(two_nodes.address, tenant_salt="one") as client:
        assert len(client.match_segments(SPEC, placed(client, NEW, LONG, SHORT)).chunks) == 3
    assert sum(node.stats().counters["approximate_hits"] for node in two_nodes.nodes) == 3


# ---- answers that are not what they should be


def lie(
    monkeypatch: pytest.MonkeyPatch, node: StorageNode, change: Callable[[LookupAnswer], LookupAnswer]
) -> None:
    honest = node.lookup

    def lookup(*arguments: Any, **options: Any) -> LookupResult:
        result = honest(*arguments, **options)
        return dataclasses.replace(result, answers=[change(answer) for answer in result.answers])

    monkeypatch.setattr(node, "lookup", lookup)


@pytest.mark.parametrize("claimed", [bytes(32), b"short", b""])
def test_a_header_of_another_context_than_was_said_is_refused(
    cluster: ServedCluster, monkeypatch: pytest.MonkeyPatch, claimed: bytes
) -> None:
    """Without a context in the answer it would pass for the exact chunk."""
    with connect(cluster.address, **PATIENT) as client:
        store(client, SYSTEM, SHORT)
        lie(
            monkeypatch,
            cluster.nodes[0],
            lambda answer: answer._replace(prefix_id=claimed) if answer.prefix_id else answer,
        )
        match = client.match_segments(SPEC, placed(client, SYSTEM, NEW, SHORT))
        assert kinds(match) == [(0, True)]
        assert client.metrics.snapshot()["miss_bad_header"] == 1
        client.release(match)
    cluster.check_nothing_is_held()


def test_an_exact_chunk_under_a_foreign_context_is_refused(
    cluster: ServedCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    with connect(cluster.address, **PATIENT) as client:
        store(client, SYSTEM)
        lie(monkeypatch, cluster.nodes[0], lambda answer: answer._replace(prefix_id=bytes(32)))
        assert not client.match_segments(SPEC, placed(client, SYSTEM)).chunks
        assert client.metrics.snapshot()["miss_bad_header"] == 1


def test_another_context_that_nobody_asked_for_is_refused(
    cluster: ServedCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    with connect(cluster.address, **PATIENT) as client:
        store(client, SYSTEM)
        node = cluster.nodes[0]
        honest = node.lookup
        monkeypatch.setattr(
            node,
            "lookup",
            lambda request, proceed: honest(dataclasses.replace(request, any_context=True), proceed),
        )
        (behind,) = [chunk.chunk_id for chunk in placed(client, NEW, SYSTEM) if chunk.first_token]
        assert not client.match(SPEC, [behind]).chunks
        assert client.metrics.snapshot()["miss_bad_header"] == 1


def test_a_node_that_knows_only_exact_chunks_is_right_about_them(
    cluster: ServedCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    with connect(cluster.address, **PATIENT) as client:
        store(client, SYSTEM, SHORT)
        node = cluster.nodes[0]
        honest = node.lookup
        monkeypatch.setattr(
            node,
            "lookup",
            lambda request, proceed: honest(dataclasses.replace(request, any_context=False), proceed),
        )
        match = client.match_segments(SPEC, placed(client, SYSTEM, NEW, SHORT))
        assert kinds(match) == [(0, True)]
        assert "miss_bad_header" not in client.metrics.snapshot()
        client.release(match)


# ---- several owners


@pytest.fixture(params=["grpc", "bulk"])
def replicas(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[ServedCluster]:
    with served_cluster(tmp_path, nodes=2, replicas=2, bulk=request.param == "bulk") as cluster:
        yield cluster


def test_the_exact_context_wins_wherever_it_is(replicas: ServedCluster) -> None:
    """Each owner has lost another one of the two."""
    with connect(replicas.address, **PATIENT) as client:
        (_, one, *_), (_, _, other, *_) = (
            store(client, SYSTEM, LONG, NEW),
            store(client, SYSTEM, NEW, LONG),
        )
        assert one.chunk_id.content_id == other.chunk_id.content_id
        for first, second in ((one, other), (other, one)):
            store(client, SYSTEM, LONG, NEW)
            store(client, SYSTEM, NEW, LONG)
            replicas.nodes[0].delete([first.chunk_id])
            replicas.nodes[1].delete([second.chunk_id])
            for prompt in ([SYSTEM, LONG, NEW], [SYSTEM, NEW, LONG]):
                match = client.match_segments(SPEC, placed(client, *prompt))
                assert all(chunk.exact for chunk in match.chunks)
                assert len(match.chunks) == 4
                check(client, match, sum(map(len, prompt)))
            # Who asks for a third context takes what comes first.
            match = client.match_segments(SPEC, placed(client, LONG))
            assert kinds(match) == [(0, False), (256, False)]
            check(client, match, len(LONG))
    replicas.check_nothing_is_held()


def test_an_approximate_chunk_that_one_owner_lacks_is_found_at_the_other(replicas: ServedCluster) -> None:
    with connect(replicas.address, **PATIENT) as client:
        chunks = [chunk.chunk_id for chunk in store(client, SYSTEM, LONG)]
        replicas.nodes[0].delete(chunks[:2])
        replicas.nodes[1].delete(chunks[2:])
        match = client.match_segments(SPEC, placed(client, NEW, LONG, SYSTEM))
        assert kinds(match) == [(256, False), (512, False), (856, False)]
        check(client, match, 1112)
    replicas.check_nothing_is_held()


def test_a_silent_owner_keeps_no_approximate_chunk_waiting(tmp_path: Path) -> None:
    with served_cluster(tmp_path, nodes=2, replicas=2) as cluster, ExitStack() as opened:
        links = [
            opened.enter_context(ShapedLink(server.address, bandwidth_bps=10e9)) for server in cluster.servers
        ]
        routes = {server.address: link.address for server, link in zip(cluster.servers, links, strict=True)}
        client = opened.enter_context(connect(cluster.address, routes=routes, **PATIENCE))
        store(client, SYSTEM, LONG)
        links[0].cut()
        started = time.monotonic()
        match = client.match_segments(SPEC, placed(client, NEW[:99], LONG))
        assert time.monotonic() - started < PROMPT_S
        assert kinds(match) == [(99, False), (355, False)]
        check(client, match, 699)


@pytest.mark.parametrize("bulk", [False, True])
def test_an_owner_that_dies_while_it_sends_an_approximate_chunk_is_replaced(
    tmp_path: Path, bulk: bool
) -> None:
    document = text(256 * 8, 9)
    with served_cluster(tmp_path, nodes=2, replicas=2, bulk=bulk) as cluster, ExitStack() as opened:
        cables, routes = [], {}
        for index in range(2):
            addresses = [server[index].address for server in (cluster.servers, cluster.bulk) if server]
            links = [opened.enter_context(ShapedLink(address, bandwidth_bps=10e9)) for address in addresses]
            routes |= {address: link.address for address, link in zip(addresses, links, strict=True)}
            cables.append(Cable(links))
        client = opened.enter_context(connect(cluster.address, routes=routes, **PATIENCE))
        store(client, SYSTEM, document)
        tokens = 256 + len(document)
        match = client.match_segments(SPEC, placed(client, NEW, document))
        assert [chunk.exact for chunk in match.chunks] == [False] * 8
        names = [chunk.member.node_id for chunk in match.chunks]
        dying = int(max(set(names), key=names.count).removeprefix("node-"))
        cables[dying].set_bandwidth(20e6)
        before = cables[dying].from_target_bytes

        def die() -> None:
            patience = time.monotonic() + PROMPT_S
            while cables[dying].from_target_bytes < before + 100_000 and time.monotonic() < patience:
                time.sleep(0.002)
            cluster.stop_node(dying)
            cables[dying].close()

        actor = threading.Thread(target=die)
        actor.start()
        report, keys, values = fetch(client, match, tokens, meanwhile=actor.join)
        assert report.complete, report
        assert client.metrics.snapshot()["failover_unreachable"] == 1
        wanted_keys, wanted_values = expected(match, tokens)
        assert torch.equal(keys, wanted_keys)
        assert torch.equal(values, wanted_values)


def test_a_damaged_chunk_is_missing_and_the_others_come(cluster: ServedCluster) -> None:
    with connect(cluster.address, **PATIENT) as client:
        store(client, SYSTEM, LONG, SHORT)
        match = client.match_segments(SPEC, placed(client, NEW, SHORT, LONG))
        damaged = match.chunks[1]
        with cluster.nodes[0].open(damaged.chunk_id, "exact-zstd") as reader:
            flip_bit(next(reader.pieces(2, 1, 1 << 20))[0])
        report, keys, _ = fetch(client, match, 1156)
        assert dict(report.missing) == {1: "checksum"}
        wanted, _ = expected(match, 1156)
        for chunk in (match.chunks[0], match.chunks[2]):
            place = slice(chunk.first_token, chunk.first_token + 256)
            assert torch.equal(keys[:, :, place], wanted[:, :, place])
    cluster.check_nothing_is_held()
