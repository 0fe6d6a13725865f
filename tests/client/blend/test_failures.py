"""Reused text that does not come, or not as it was: the answer is the one that is given without it."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from kvstore_bench.shaping import ShapedLink
from kvstore_client import KVStoreClient, connect
from kvstore_client.engines.transformers import CachedModel
from kvstore_client.recompute import Recompute, selector
from kvstore_client.settings import SelectorName
from kvstore_cluster.lookup import LookupRequest
from tests.client.blend.library import GREEDY, PATIENT, QUESTION, SYSTEM, Library, check_close, joined, text
from tests.client.blend.reference import sharp
from tests.client.changed_settings import changed
from tests.client.conftest import served_cluster
from tests.damage import flip_bit

PAPERS = [text(512, 600 + seed) for seed in range(5)]
SEGMENTS = [SYSTEM, *reversed(PAPERS), QUESTION]
FAST_BPS = 10e9
PATIENCE_S = 60.0
REPAIRS = [
    pytest.param(Recompute(name, 0.2, drift), marks=[pytest.mark.slow] if slow else [], id=f"{name}-{drift}")
    for number, name in enumerate(SelectorName)
    for slow, drift in enumerate((number % 2 == 0, number % 2 == 1))
]
IMPATIENT = {"fetch_timeout_s": 5.0, "stall_timeout_s": 0.5}


@dataclass
class Remote(Library):
    """A library each of whose two nodes is behind a link of its own. Nothing new is stored."""

    links: list[ShapedLink]

    def kill(self, *nodes: int) -> None:
        """With what is on the way from them, which may be all that was asked for."""
        for node in nodes:
            self.cluster.stop_node(node)
            self.links[node].close()

    def while_fetching(
        self, action: Callable[[], object], recompute: Recompute | None = None
    ) -> torch.Tensor:
        """Answer, doing `action` when something of it is on its way."""
        with self.acting(action, 5e6):
            return self.answer(*SEGMENTS, recompute=recompute)

    @contextmanager
    def acting(self, action: Callable[[], object], bandwidth_bps: float) -> Iterator[None]:
        """Does `action` when something has come through both links, which are that slow until the end."""
        for link in self.links:
            link.set_bandwidth(bandwidth_bps)
        before = [link.from_target_bytes for link in self.links]

        def act() -> None:
            deadline_s = time.monotonic() + 30
            while time.monotonic() < deadline_s and any(
                link.from_target_bytes < b + 60_000 for link, b in zip(self.links, before, strict=True)
            ):
                time.sleep(0.002)
            action()

        actor = threading.Thread(target=act)
        actor.start()
        try:
            yield
        finally:
            actor.join()
            for link in self.links:
                link.set_bandwidth(FAST_BPS)


@pytest.fixture
def remote(tmp_path: Path, one_thread: None) -> Iterator[Remote]:
    model = sharp("llama")
    with served_cluster(tmp_path, nodes=2) as cluster, ExitStack() as opened:
        with connect(cluster.address, **PATIENT) as writer:
            cached = CachedModel(model, writer)
            cached.generate(joined(SYSTEM, *PAPERS, QUESTION)[0], **GREEDY)
            writer.store.flush()
            cached.close()
        assert cluster.stored_chunks() == 11
        assert all(node.stats().chunks >= 2 for node in cluster.nodes)
        endpoints = [server.address for server in cluster.servers]
        links = [opened.enter_context(ShapedLink(endpoint, bandwidth_bps=FAST_BPS)) for endpoint in endpoints]
        routes = {endpoint: link.address for endpoint, link in zip(endpoints, links, strict=True)}
        settings = PATIENT | IMPATIENT | {"lookup_timeout_s": 2.0}
        with connect(cluster.address, routes=routes, **settings) as client:
            cached = CachedModel(model, client, store=False)
            yield Remote(cluster, client, cached, links)
            cached.close()


def check_what_is_left(remote: Remote, answer: torch.Tensor, recompute: Recompute | None) -> None:
    """The answer is that of a prompt of which only what came is stored, or if that is little the model's own."""
    report = remote.cached.last_report
    if not report.reused_tokens:
        assert torch.equal(answer, remote.plain(*SEGMENTS))
        return
    assert report.fetch is not None
    assert report.approximate_tokens == 256 * (report.fetch.fetched - 1)
    assert torch.equal(remote.answer(*SEGMENTS, recompute=recompute), answer)
    assert remote.cached.last_report.approximate_tokens == report.approximate_tokens


@pytest.mark.slow
def test_everything_comes_when_nothing_is_wrong(remote: Remote) -> None:
    for recompute in (Recompute(name, 0.2, drift) for name in SelectorName for drift in (True, False)):
        remote.answer(*SEGMENTS, recompute=recompute)
        report = remote.cached.last_report
        apart = {"chunk": 10 * int(0.2 * 256), "document": 5 * int(0.2 * 512), "prompt": int(0.2 * 2560)}
        assert report.approximate_tokens == 2560
        assert report.recomputed_tokens == apart[selector(recompute.selector).share_of]
        assert report.fetch is not None
        assert report.fetch.complete
    remote.cluster.check_nothing_is_held()


@pytest.mark.parametrize("recompute", REPAIRS)
def test_flipped_bits_are_found(remote: Remote, recompute: Recompute) -> None:
    """One chunk's: the others are reused where the choice waits for all of them, else all is computed."""
    prompt, lengths = joined(SYSTEM, *PAPERS, QUESTION)
    placed = remote.client.segment_chunks(remote.cached.spec, prompt[0].tolist(), lengths)
    bad = placed[4].chunk_id
    node = next(
        n for n in remote.cluster.nodes if n.lookup(LookupRequest([bad], ["exact-zstd"])).answers[0].encoding
    )
    with node.open(bad, "exact-zstd") as reader:
        flip_bit(next(reader.pieces(reader.header.geometry.frame_count - 1, 1, 1 << 20))[0])
    answer = remote.answer(*SEGMENTS, recompute=recompute)
    assert remote.counted("miss_checksum") == 1
    report = remote.cached.last_report
    assert report.fetch is not None
    assert list(report.fetch.missing.values()).count("checksum") == 1
    if recompute.selector in (SelectorName.FOCUS, SelectorName.QUERY):
        assert report.approximate_tokens == 2304
    node.delete([bad])
    check_what_is_left(remote, answer, recompute)
    remote.cluster.check_nothing_is_held()


@pytest.mark.parametrize(
    ("index", "recompute"),
    [(0, Recompute()), pytest.param(1, Recompute(SelectorName.FIRST_K, drift=False), marks=pytest.mark.slow)],
)
def test_a_node_that_dies_during_a_fetch(remote: Remote, index: int, recompute: Recompute) -> None:
    answer = remote.while_fetching(lambda: remote.kill(index), recompute)
    report = remote.cached.last_report
    assert report.fetch is not None
    assert "unreachable" in report.fetch.missing.values()
    assert remote.counted("miss_unreachable") >= 1
    lost = remote.counted("chunks_missing") + remote.counted("chunks_cancelled")
    assert lost == len(report.fetch.missing)
    check_what_is_left(remote, answer, recompute)


def test_a_link_that_goes_silent_during_a_fetch(remote: Remote) -> None:
    answer = remote.while_fetching(remote.links[0].cut)
    assert remote.counted("miss_stalled") >= 1
    check_what_is_left(remote, answer, None)


def test_all_nodes_die_during_a_fetch(remote: Remote) -> None:
    assert torch.equal(remote.while_fetching(lambda: remote.kill(0, 1)), remote.plain(*SEGMENTS))
    assert remote.cached.last_report.reused_tokens == 0
    assert torch.equal(remote.answer(*SEGMENTS), remote.plain(*SEGMENTS))
    check_close(remote.asked(*SEGMENTS), remote.plainly_asked(*SEGMENTS))


@pytest.mark.parametrize("recompute", [Recompute(), Recompute(SelectorName.FIRST_K, drift=False)], ids=str)
def test_a_link_too_slow_for_the_deadline(remote: Remote, recompute: Recompute) -> None:
    settings = changed(remote.client.settings, fetch_timeout_s=0.4, stall_timeout_s=PATIENCE_S)
    with KVStoreClient(settings) as client:
        given_up: list[bool] = []

        def hold_the_rest_back() -> None:
            """Nothing more comes until the fetch has ended, which only its deadline can do."""
            for link in remote.links:
                link.cut()
            until_s = time.monotonic() + PATIENCE_S
            while time.monotonic() < until_s and not client.metrics.snapshot().get("miss_timeout"):
                time.sleep(0.002)
            given_up.append("miss_timeout" in client.metrics.snapshot())
            for link in remote.links:
                link.restore()

        cached = CachedModel(remote.cached.model, client, store=False)
        prompt, lengths = joined(*SEGMENTS)
        with remote.acting(hold_the_rest_back, 2e6):
            answer = cached.generate(prompt, segments=lengths, recompute=recompute, **GREEDY)
        assert given_up == [True]
        assert torch.equal(answer, remote.plain(*SEGMENTS))
        assert cached.last_report.reused_tokens == 0
        assert client.metrics.snapshot()["miss_timeout"] >= 1
        cached.close()
    remote.cluster.check_nothing_is_held()


def test_a_service_that_was_never_there() -> None:
    model, (prompt, lengths) = sharp("llama"), joined(*SEGMENTS)
    with connect("127.0.0.1:1", lookup_timeout_s=0.5) as client:
        cached = CachedModel(model, client)
        answer = cached.generate(prompt, segments=lengths, **GREEDY)
        assert torch.equal(answer, model.generate(prompt, **GREEDY))
        assert client.metrics.snapshot()["miss_unreachable"] == 1
        cached.close()


def test_a_closed_client_prefills(remote: Remote) -> None:
    remote.client.close()
    assert torch.equal(remote.answer(*SEGMENTS), remote.plain(*SEGMENTS))
    assert remote.counted("miss_closed") == 1


def test_no_memory_for_buffers_prefills(remote: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise MemoryError("no memory")

    monkeypatch.setattr(remote.client.buffers, "acquire", full)
    assert torch.equal(remote.answer(*SEGMENTS), remote.plain(*SEGMENTS))
    assert str(remote.cached.last_report.why_not).startswith("no_resources: ")
    assert remote.counted("chunks_missing") == 11
    remote.cluster.check_nothing_is_held()
