"""Two owners for every chunk: whatever happens to one of them, the other one's chunks come, in time."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from kvstore_api.placement import Member, Placement
from kvstore_bench.shaping import ShapedLink
from kvstore_client import KVStoreClient, cluster_view, connect
from kvstore_client.cluster_view import ClusterView
from kvstore_client.match import Match
from kvstore_client.new_chunk import NewChunk
from kvstore_client.replicas import Search
from kvstore_client.transport import Transport
from kvstore_cluster.lookup import LookupRequest
from kvstore_codec.identity import ChunkId
from kvstore_service.grpc_storage import serve_storage
from tests.client.changed_settings import changed
from tests.client.chunks import SPEC, ids, random_kv
from tests.client.conftest import ServedCluster, served_cluster
from tests.damage import flip_bit

CHUNKS = 24
# A sound node of a busy machine may be silent for a moment, which must not be taken for a failure: `failover_s` is
# longer. The deadlines are so long that whoever waits for one of them exceeds PROMPT_S, and nobody else does.
PATIENCE = {
    "lookup_timeout_s": 60.0,
    "failover_s": 1.0,
    "stall_timeout_s": 60.0,
    "fetch_timeout_s": 60.0,
    "retry_after_s": 60.0,
    "membership_ttl_s": 0.1,
}
PROMPT_S = 30.0


@dataclass
class Cable:
    """What leads to one node: a link to its gRPC endpoint, and one to its bulk port if it has one."""

    links: list[ShapedLink]

    def cut(self) -> None:
        for link in self.links:
            link.cut()

    def restore(self) -> None:
        for link in self.links:
            link.restore()

    def close(self) -> None:
        for link in self.links:
            link.close()

    def set_bandwidth(self, bandwidth_bps: float) -> None:
        for link in self.links:
            link.set_bandwidth(bandwidth_bps)

    @property
    def from_target_bytes(self) -> int:
        return sum(link.from_target_bytes for link in self.links)


@dataclass
class Replicated:
    """Three nodes behind a cable each, two of which hold each of the document's chunks."""

    cluster: ServedCluster
    client: KVStoreClient
    cables: list[Cable]
    document: list[ChunkId]

    def match(self) -> Match:
        return self.client.match(SPEC, self.document)

    def fetch(self, match: Match, meanwhile: Callable[[], object] = lambda: None) -> None:
        """Everything comes, and is what was stored."""
        assert len(match.chunks) == len(self.document)
        buffers = self.client.buffers.acquire(SPEC, match.tokens)
        fetch = self.client.fetch(match, buffers, None)
        meanwhile()
        report = fetch.wait()
        assert report.complete, report
        for index in range(len(self.document)):
            keys, values = random_kv(index)
            tokens = slice(256 * index, 256 * (index + 1))
            assert torch.equal(buffers.keys[:, :, tokens], keys)
            assert torch.equal(buffers.values[:, :, tokens], values)

    def counted(self, name: str) -> int:
        return self.client.metrics.snapshot().get(name, 0)

    def carriers(self, monkeypatch: pytest.MonkeyPatch) -> set[str]:
        """Ids of the nodes from which KV bytes are read, or to which they are written, from now on."""
        used: set[str] = set()
        transport = ClusterView.transport

        def noted(view: ClusterView, member: Member) -> Transport:
            used.add(member.node_id)
            return transport(view, member)

        monkeypatch.setattr(ClusterView, "transport", noted)
        return used

    def busiest(self, match: Match) -> int:
        """Index of the node that most of the match is on."""
        names = [chunk.member.node_id for chunk in match.chunks]
        return int(max(set(names), key=names.count).removeprefix("node-"))


def put(client: KVStoreClient, document: list[ChunkId]) -> int:
    chunks = [NewChunk(id_, lambda i=index: random_kv(i)) for index, id_ in enumerate(document)]  # type: ignore[misc]
    return client.store.put(SPEC, chunks).result(timeout=30)


def on_node(cluster: ServedCluster, index: int, document: list[ChunkId]) -> list[int]:
    """Which of these chunks a node has."""
    answers = cluster.nodes[index].lookup(LookupRequest(document, ["exact-zstd"])).answers
    return [number for number, answer in enumerate(answers) if answer.encoding]


@pytest.fixture(params=["grpc", "bulk"])
def replicated(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Replicated]:
    document = ids(CHUNKS)
    bulk = request.param == "bulk"
    with served_cluster(tmp_path, nodes=3, replicas=2, bulk=bulk) as cluster, ExitStack() as opened:
        cables, routes = [], {}
        for index in range(3):
            addresses = [server[index].address for server in (cluster.servers, cluster.bulk) if server]
            links = [opened.enter_context(ShapedLink(address, bandwidth_bps=10e9)) for address in addresses]
            routes |= {address: link.address for address, link in zip(addresses, links, strict=True)}
            cables.append(Cable(links))
        client = opened.enter_context(connect(cluster.address, routes=routes, **PATIENCE))
        assert put(client, document) == CHUNKS
        yield Replicated(cluster, client, cables, document)


def test_every_chunk_is_on_both_its_owners(replicated: Replicated) -> None:
    members = replicated.client._view.membership().members
    owners = Placement(members, 2).owners([id_.content_id for id_ in replicated.document])
    for index, member in enumerate(members):
        held = [number for number, owned in enumerate(owners) if member in owned]
        assert on_node(replicated.cluster, index, replicated.document) == held
    assert replicated.counted("chunks_stored") == CHUNKS
    assert replicated.counted("chunks_under_replicated") == 0
    replicated.fetch(replicated.match())
    replicated.cluster.check_nothing_is_held()


@pytest.mark.parametrize("dead", [0, 1, 2])
def test_a_dead_node_is_noticed_by_nobody(replicated: Replicated, dead: int) -> None:
    """A node that is down is not taken for one that is silent: the other owner is asked at once."""
    with KVStoreClient(
        changed(replicated.client.settings, failover_s=60.0, lookup_timeout_s=120.0)
    ) as client:
        unhurried = replace(replicated, client=client)
        unhurried.fetch(unhurried.match())
        replicated.cluster.stop_node(dead)
        started = time.monotonic()
        unhurried.fetch(unhurried.match())
        assert time.monotonic() - started < PROMPT_S


def test_a_silent_node_is_not_waited_for(replicated: Replicated, monkeypatch: pytest.MonkeyPatch) -> None:
    silent = replicated.busiest(replicated.match())
    replicated.cables[silent].cut()
    started = time.monotonic()
    match = replicated.match()
    assert time.monotonic() - started < PROMPT_S
    replicated.fetch(match)
    assert time.monotonic() - started < PROMPT_S
    # From now on it is known to be silent.
    asked: set[str] = set()
    call = Search._call

    def noted(search: Search, member: Member, chunks: Sequence[int], *, any_context: bool) -> None:
        asked.add(member.node_id)
        call(search, member, chunks, any_context=any_context)

    monkeypatch.setattr(Search, "_call", noted)
    replicated.client.release(replicated.match())
    assert asked == {"node-0", "node-1", "node-2"} - {f"node-{silent}"}


def test_an_aborted_search_pauses_no_silent_node(replicated: Replicated) -> None:
    for cable in replicated.cables:
        cable.cut()
    view, settings = replicated.client._view, replicated.client.settings
    search = Search(view, settings, replicated.document[:1], ["exact-zstd"], lambda *_: True)
    searching = threading.Thread(target=search.run, args=([0],))
    searching.start()
    while search.asked < 2:  # the second owner is asked when the first one was silent for `failover_s`
        searching.join(0.01)
        assert searching.is_alive()
    search.cancel()
    searching.join(PROMPT_S)
    assert not searching.is_alive()
    assert search.failures == []
    assert not any(view.is_paused(member.endpoint) for member in view.membership().members)


@pytest.mark.parametrize(("how", "reason"), [("stop", "unreachable"), ("cut", "silent")])
def test_a_node_that_fails_during_a_fetch_is_replaced(replicated: Replicated, how: str, reason: str) -> None:
    match = replicated.match()
    failing = replicated.busiest(match)
    cable = replicated.cables[failing]
    cable.set_bandwidth(20e6)
    before = cable.from_target_bytes

    def fail() -> None:
        patience = time.monotonic() + PROMPT_S
        while cable.from_target_bytes < before + 100_000 and time.monotonic() < patience:
            time.sleep(0.002)
        if how == "stop":
            replicated.cluster.stop_node(failing)
            cable.close()
        else:
            cable.cut()

    actor = threading.Thread(target=fail)
    actor.start()
    started = time.monotonic()
    replicated.fetch(match, actor.join)
    assert time.monotonic() - started < PROMPT_S
    assert replicated.counted(f"failover_{reason}") == 1
    for index in {0, 1, 2} - {failing}:
        patience = time.monotonic() + PROMPT_S
        while time.monotonic() < patience and replicated.cluster.nodes[index].stats().leases:
            time.sleep(0.01)
        assert replicated.cluster.nodes[index].stats().leases == 0


def test_chunks_that_went_are_read_from_the_other_owner(replicated: Replicated) -> None:
    match = replicated.match()
    index = replicated.busiest(match)
    gone = [chunk.chunk_id for chunk in match.chunks if chunk.member.node_id == f"node-{index}"]
    replicated.cluster.nodes[index].delete(gone)
    replicated.fetch(match)
    assert replicated.counted("failover_gone") == 1
    replicated.fetch(replicated.match())
    replicated.cluster.check_nothing_is_held()


def test_damaged_frames_are_read_from_the_other_owner(replicated: Replicated) -> None:
    match = replicated.match()
    for chunk in match.chunks[3], match.chunks[7]:
        node = next(n for n in replicated.cluster.nodes if n.node_id == chunk.member.node_id)
        with node.open(chunk.chunk_id, "exact-zstd") as reader:
            flip_bit(next(reader.pieces(2, 1, 1 << 20))[0])
    replicated.fetch(match)
    assert replicated.counted("failover_checksum") == 2
    replicated.cluster.check_nothing_is_held()


def test_chunks_that_went_everywhere_are_missing(replicated: Replicated) -> None:
    match = replicated.match()
    for node in replicated.cluster.nodes:
        node.delete(replicated.document[5:6])
    buffers = replicated.client.buffers.acquire(SPEC, match.tokens)
    report = replicated.client.fetch(match, buffers, None).wait()
    assert (report.delivered, dict(report.missing)) == (5, {5: "gone"})
    assert len(replicated.match().chunks) == 5


def test_other_bytes_of_the_same_chunk_are_not_mixed(replicated: Replicated) -> None:
    """Two workers computed it at the same time, with different rounding, and each was first at one owner."""
    match = replicated.match()
    chunk = match.chunks[0]
    node = next(n for n in replicated.cluster.nodes if n.node_id == chunk.member.node_id)
    with connect(replicated.cluster.address) as other:
        for holder in replicated.cluster.nodes:
            if holder is not node:
                holder.delete([chunk.chunk_id])
        other.store.put(SPEC, [NewChunk(chunk.chunk_id, lambda: random_kv(99))]).result(timeout=60)
    node.delete([chunk.chunk_id])
    buffers = replicated.client.buffers.acquire(SPEC, match.tokens)
    assert dict(replicated.client.fetch(match, buffers, None).wait().missing) == {0: "gone"}


def test_a_slow_node_that_has_the_only_copy_is_waited_for(replicated: Replicated) -> None:
    match = replicated.match()
    index = replicated.busiest(match)
    only = [replicated.document[number] for number in on_node(replicated.cluster, index, replicated.document)]
    for other in {0, 1, 2} - {index}:
        replicated.cluster.nodes[other].delete(only)
    cable = replicated.cables[index]
    cable.cut()
    restored = threading.Timer(0.7, cable.restore)
    restored.start()
    replicated.fetch(match, restored.join)


def test_puts_go_on_when_an_owner_is_silent(replicated: Replicated, monkeypatch: pytest.MonkeyPatch) -> None:
    document = ids(6, seed=3)
    replicated.cables[0].cut()
    patient = changed(replicated.client.settings, put_stall_timeout_s=1.5)
    with KVStoreClient(patient) as client:
        assert put(client, document) == 6
        silent = client.metrics.snapshot()
        assert 0 < silent["chunks_under_replicated"] < 6
        assert silent["miss_store_stalled"] == 1
        # Now it is known: the next in rank stands in for it.
        again = ids(6, seed=4)
        written_to = replicated.carriers(monkeypatch)
        assert put(client, again) == 6
        assert written_to == {"node-1", "node-2"}
        assert client.metrics.snapshot()["miss_store_stalled"] == 1
        assert client.metrics.snapshot()["chunks_under_replicated"] == silent["chunks_under_replicated"]
        for index in (1, 2):
            assert on_node(replicated.cluster, index, again) == list(range(6))


def test_a_coordinator_that_forgot_its_nodes_stops_no_read(
    replicated: Replicated, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was restarted, and hears of its nodes one by one."""
    monkeypatch.setattr(cluster_view, "_CHANGE_S", 300.0)
    view = replicated.client._view
    members = view.membership().members
    for forgotten in range(1, 4):
        replicated.cluster.books.leave(members[forgotten - 1].node_id, 1)
        patience = time.monotonic() + PROMPT_S
        while len(view.membership().members) > 3 - forgotten and time.monotonic() < patience:
            time.sleep(0.02)
        assert len(view.membership().members) == 3 - forgotten
        replicated.fetch(replicated.match())


def test_nodes_keep_what_models_attended_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = ids(8)
    with served_cluster(tmp_path, memory_bytes=2 << 20) as cluster, connect(cluster.address) as client:
        assert put(client, document[:4]) == 4
        reported = threading.Event()
        report = cluster.nodes[0].report

        def note(*arguments: object) -> None:
            report(*arguments)  # type: ignore[arg-type]
            reported.set()

        monkeypatch.setattr(cluster.nodes[0], "report", note)
        assert client.report({chunk_id: float(index == 0) for index, chunk_id in enumerate(document[:4])})
        assert reported.wait(PROMPT_S)
        assert put(client, document[4:]) == 4
        kept = on_node(cluster, 0, document)
    assert 4 <= len(kept) < 8
    assert 0 in kept
    assert 1 not in kept


def test_a_node_that_answers_again_is_asked_again(replicated: Replicated) -> None:
    """However long it was away: the other owner may be the next to go."""
    patient = changed(replicated.client.settings, retry_after_s=60.0, membership_ttl_s=60.0)
    with KVStoreClient(patient) as client:
        match = client.match(SPEC, replicated.document)
        client.release(match)
        away = replicated.busiest(match)
        replicated.cables[away].cut()
        client.release(client.match(SPEC, replicated.document))
        endpoint = replicated.cluster.servers[away].address
        assert client._view.is_paused(endpoint)
        replicated.cables[away].restore()
        patience = time.monotonic() + PROMPT_S
        while client._view.is_paused(endpoint) and time.monotonic() < patience:
            client.release(client.match(SPEC, replicated.document))
            time.sleep(0.05)
        for index in {0, 1, 2} - {away}:
            replicated.cluster.stop_node(index)
        mine = [
            replicated.document[number] for number in on_node(replicated.cluster, away, replicated.document)
        ]
        assert len(client.match(SPEC, mine[:1]).chunks) == 1


def test_nodes_that_died_together_are_found_as_soon_as_they_are_back(tmp_path: Path) -> None:
    document = ids(4)
    with (
        served_cluster(tmp_path, nodes=2, replicas=2) as cluster,
        connect(cluster.address, **PATIENCE | {"membership_ttl_s": 60.0}) as client,
    ):
        assert put(client, document) == len(document)
        for server in cluster.servers:
            server.stop(0)
        assert not client.match(SPEC, document).chunks
        for index, node in enumerate(cluster.nodes):
            cluster.servers[index] = serve_storage(node, host="127.0.0.1")
            cluster.books.join(Member(node.node_id, cluster.servers[index].address), incarnation=2)
        match = client.match(SPEC, document)
        assert len(match.chunks) == len(document)
        client.release(match)
