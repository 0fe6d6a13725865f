"""Where restored KV goes: into contiguous buffers, into the blocks of an engine, or nowhere when those raise."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kvstore_client import KVStoreClient, connect
from kvstore_client.fetch import Computing, Fetch, FetchReport
from kvstore_client.match import Match
from kvstore_client.new_chunk import NewChunk
from kvstore_client.planning import Costs, PrefillCost, Profile
from kvstore_codec.rope import RotaryTable
from tests.client.chunks import SPEC, random_kv
from tests.client.conftest import ServedCluster, served_cluster
from tests.client.paged import PagedKV
from tests.codec.chunks import features_of, make_calibration

GAP = 44
"""Tokens before every chunk that are no chunk's: chunks do not begin where blocks do."""
CHUNKS = 3
TOKENS = CHUNKS * (GAP + 256)
WAIT_S = 60


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedCluster]:
    folder = tmp_path_factory.mktemp("cluster")
    with served_cluster(folder, nodes=2, bulk=True) as cluster:
        calibration = make_calibration(SPEC)
        with connect(cluster.address, cache_dir=folder) as client:
            client.calibrations.publish(calibration.to_bytes(), calibration.model_digest)
        yield cluster
        cluster.check_nothing_is_held()


def rotary() -> tuple[RotaryTable, ...]:
    """Another one for every position and layer."""
    angles = torch.outer(torch.arange(TOKENS).float(), torch.arange(1, SPEC.head_dim + 1) / 100)
    return tuple(
        RotaryTable((angles * layer).cos(), (angles * layer).sin()) for layer in range(1, SPEC.layers + 1)
    )


def stored_match(client: KVStoreClient, seed: int) -> Match:
    tokens = torch.randint(0, 1000, (TOKENS,), generator=torch.Generator().manual_seed(seed)).tolist()
    chunks = client.segment_chunks(SPEC, tokens, [GAP, 256] * CHUNKS)
    new = [
        NewChunk(chunk.chunk_id, lambda i=index: random_kv(i), features=lambda: features_of(256))  # type: ignore[misc]
        for index, chunk in enumerate(chunks)
        if chunk.first_token % (GAP + 256) == GAP
    ]
    assert client.store.put(SPEC, new).result(WAIT_S) == CHUNKS
    match = client.match_segments(SPEC, chunks)
    assert [chunk.first_token for chunk in match.chunks] == [44, 344, 644]
    return match


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "keys transposed"])
@pytest.mark.parametrize(
    "name", ["exact-zstd", "exact-raw@32", "medium-zstd", "medium-klt-pco", "low-klt-hevc-cpu"]
)
def test_blocks_in_any_order_hold_what_buffers_hold(
    served: ServedCluster, tmp_path: Path, name: str, packed: bool
) -> None:
    with connect(served.address, encoding=name, cache_dir=tmp_path, decode_threads=2) as client:
        client.prepare(SPEC).result(WAIT_S)
        match = stored_match(client, seed=sum(name.encode()) + packed)
        buffers = client.buffers.acquire(SPEC, TOKENS)
        buffers.keys.fill_(-1)
        buffers.values.fill_(-1)
        paged = PagedKV(SPEC, TOKENS, packed=packed, seed=len(name))
        for destination in (buffers, paged):
            fetch = client.fetch(match, destination, rotary(), features=lambda _: features_of(256))
            for layer in range(SPEC.layers):
                assert fetch.wait_layer(layer)
            assert fetch.finish().complete
        keys, values = paged.contiguous(TOKENS)
        assert torch.equal(keys, buffers.keys)
        assert torch.equal(values, buffers.values)
        assert (buffers.values != -1).any(dim=-1).sum() == SPEC.layers * SPEC.kv_heads * CHUNKS * 256


class RaisingKV(PagedKV):
    """Raises for ranges of the second chunk from some layer on."""

    def __init__(self, when: str) -> None:
        super().__init__(SPEC, TOKENS, packed=True)
        self._when = when

    def prepare(self, layers: slice, tokens: slice) -> tuple[torch.Tensor, torch.Tensor]:
        self._raise("prepare", layers, tokens)
        return super().prepare(layers, tokens)

    def complete(self, layers: slice, tokens: slice, keys: torch.Tensor, values: torch.Tensor) -> None:
        self._raise("complete", layers, tokens)
        super().complete(layers, tokens, keys, values)

    def _raise(self, now: str, layers: slice, tokens: slice) -> None:
        if now == self._when and 344 <= tokens.start < 600 and layers.start:
            raise RuntimeError("the engine has taken the block away")


@pytest.mark.parametrize("when", ["prepare", "complete"])
@pytest.mark.parametrize("name", ["exact-zstd", "medium-klt-pco"])
def test_a_destination_that_raises_makes_its_chunk_missing(
    served: ServedCluster, tmp_path: Path, name: str, when: str
) -> None:
    with connect(served.address, encoding=name, cache_dir=tmp_path) as client:
        client.prepare(SPEC).result(WAIT_S)
        match = stored_match(client, seed=1000 + sum((name + when).encode()))
        fetch = client.fetch(match, RaisingKV(when), None, features=lambda _: features_of(256))
        report = fetch.wait()
        assert dict(report.missing) == {1: "destination"}
        assert (report.fetched, report.delivered) == (2, 1)
        assert client.metrics.snapshot()["miss_destination"] == 1


@pytest.mark.parametrize("planned", [False, True])
def test_what_cannot_be_decoded_here_is_missing_at_once(
    served: ServedCluster, tmp_path: Path, planned: bool
) -> None:
    """A match came from another process before the calibration did."""
    with connect(served.address, encoding="medium-klt-pco", cache_dir=tmp_path / "a") as finder:
        finder.prepare(SPEC).result(WAIT_S)
        data = stored_match(finder, seed=5000 + planned).to_bytes()
    costs = Costs(Profile({}, PrefillCost(0.01, 4e-4, 1e-8), 1.0, 2, {"model": "m"}))
    with connect(served.address, cache_dir=tmp_path / "b") as client:
        match = client.match_from_bytes(SPEC, data)
        assert match.tokens == CHUNKS * 256
        computing = Computing(costs, TOKENS, 10) if planned else None
        destination = PagedKV(SPEC, TOKENS, packed=True)
        report = client.fetch(match, destination, None, computing=computing).wait()
        assert dict(report.missing) == dict.fromkeys(range(CHUNKS), "calibration_loading")
        assert (report.received_bytes, report.computed) == (0, 0)
        assert client.ready_calibrations.for_model(SPEC.digest).result(WAIT_S) is not None
        again = client.match_from_bytes(SPEC, data)
        assert client.fetch(again, destination, None, features=lambda _: features_of(256)).wait().complete


def polled(fetch: Fetch) -> FetchReport:
    tick = threading.Event()
    for _ in range(WAIT_S * 100):
        if (report := fetch.finished()) is not None:
            return report
        tick.wait(0.01)
    raise AssertionError("the fetch does not end")


def test_completion_is_polled(served: ServedCluster, tmp_path: Path) -> None:
    with connect(served.address, cache_dir=tmp_path) as client:
        match = stored_match(client, seed=2000)
        first, second = (client.fetch(match, PagedKV(SPEC, TOKENS, packed=True), None) for _ in range(2))
        assert first.job_id != second.job_id
        report = polled(first)
        assert report.complete
        assert not any(thread.is_alive() for thread in first._threads)
        assert first.finish() is first.finished() is report
        assert polled(second).complete
        assert client.metrics.snapshot()["chunks_delivered"] == 2 * CHUNKS, "each fetch is counted once"
    served.check_nothing_is_held()


class BlockingKV(PagedKV):
    def __init__(self) -> None:
        super().__init__(SPEC, TOKENS, packed=True)
        self.entered, self.go = threading.Event(), threading.Event()

    def complete(self, layers: slice, tokens: slice, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.entered.set()
        assert self.go.wait(WAIT_S)
        super().complete(layers, tokens, keys, values)


def test_a_fetch_is_not_finished_while_a_thread_of_it_may_write(
    served: ServedCluster, tmp_path: Path
) -> None:
    """Also after its deadline, when everything that is still open has been given up."""
    with connect(served.address, cache_dir=tmp_path, fetch_timeout_s=0.5, decode_threads=1) as client:
        match, paged = stored_match(client, seed=3000), BlockingKV()
        fetch = client.fetch(match, paged, None)
        assert paged.entered.wait(WAIT_S)
        fetch._fetch_state.wait()
        assert fetch.finished() is None
        paged.go.set()
        assert dict(polled(fetch).missing) == {0: "timeout", 1: "timeout", 2: "timeout"}
    served.check_nothing_is_held()


def test_a_fetch_from_a_node_that_is_gone_ends_by_itself_when_polled(tmp_path: Path) -> None:
    with (
        served_cluster(tmp_path, bulk=True) as cluster,
        connect(cluster.address, cache_dir=tmp_path) as client,
    ):
        match = stored_match(client, seed=4000)
        cluster.stop_storage()
        report = polled(client.fetch(match, PagedKV(SPEC, TOKENS, packed=True), None))
        assert set(report.missing) == {0, 1, 2}
