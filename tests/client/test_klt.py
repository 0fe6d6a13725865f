"""KV coded with a calibration goes from one worker to another; whatever becomes of the calibration, answers come."""

import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from kvstore_bench.shaping import ShapedLink
from kvstore_client import ClientSettings, KVStoreClient, connect
from kvstore_client.engines.transformers import CachedModel
from kvstore_client.engines.transformers.calibrate import ObservedModel
from kvstore_client.engines.transformers.features import embedded
from kvstore_client.engines.transformers.rotary import rotary_tables
from kvstore_client.engines.transformers.spec import spec_of
from kvstore_client.new_chunk import NewChunk
from kvstore_client.reuse.features import PromptFeatures
from kvstore_codec.calibration import Calibration
from kvstore_codec.identity import CHUNK_TOKENS
from kvstore_service.calibration import Options, calibrate, plan_passages
from tests.client.chunks import flip_bit
from tests.client.conftest import ServedCluster, served_cluster
from tests.client.models import random_prompt, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

MEDIUM = "medium-klt-pco"
GREEDY = {"do_sample": False, "max_new_tokens": 4}
PROMPT = random_prompt(600, seed=1)


class Silent:
    def advance(self, stage: str, done: int, total: int) -> None: ...

    def note(self, text: str) -> None: ...


def sharp_model() -> PreTrainedModel:
    """Random weights, but large enough for the model to mind what its KV is."""
    model = tiny_model()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    return model


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    text = random_prompt(2400, seed=9)[0]
    options = Options(period_layers=2, rank=8)
    return calibrate(ObservedModel(sharp_model()), plan_passages([text], 10**6, 8192), options, Silent())


@pytest.fixture
def new_client(cluster: ServedCluster, tmp_path: Path) -> Callable[..., KVStoreClient]:
    """A client as another process would have it: with a cache folder of its own unless one is given."""
    made = 0

    def connected(address: str = cluster.address, **settings: Any) -> KVStoreClient:
        nonlocal made
        made += 1
        folder = tmp_path / f"cache-{made}"
        return connect(address, **{"encoding": MEDIUM, "cache_dir": folder, "retry_after_s": 0.0, **settings})

    return connected


def publish(address: str, calibration: Calibration) -> None:
    with connect(address) as client:
        client.calibrations.publish(calibration.to_bytes(), calibration.model_digest)


@pytest.fixture
def stored(cluster: ServedCluster, calibration: Calibration, new_client: Callable[..., KVStoreClient]) -> int:
    """The prompt's chunks are stored as MEDIUM. Their bytes."""
    publish(cluster.address, calibration)
    with new_client() as client:
        CachedModel(sharp_model(), client).generate(PROMPT, **GREEDY)
        client.store.flush()
        counts = client.metrics.snapshot()
        assert counts["chunks_stored"] == 2
        assert counts["guarded_exact"] >= 0
        assert counts["guarded_finer"] >= 0
        return counts["bytes_out"]


def counted(client: KVStoreClient, reason: str) -> int:
    return client.metrics.snapshot().get(f"miss_{reason}", 0)


def loads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "kvstore-calibration"]


def slow_down(link: ShapedLink, client: KVStoreClient) -> None:
    """For the calibration alone: who the nodes are is asked before, not behind a download that fills the link."""
    spec = spec_of(tiny_model())
    assert not client.match(spec, client.chunk_ids(spec, range(CHUNK_TOKENS))).chunks
    link.set_bandwidth(2e6)


def wait_for_calibration(cached: CachedModel) -> None:
    assert cached.client.prepare(cached.spec).result(20) is not None


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    yield
    assert loads() == []


def test_another_worker_gets_what_was_coded(
    cluster: ServedCluster, calibration: Calibration, new_client: Callable[..., KVStoreClient]
) -> None:
    publish(cluster.address, calibration)
    model = sharp_model()
    plain = model.generate(PROMPT, return_dict_in_generate=True, **GREEDY).past_key_values
    with new_client(encoding="step0.0005-klt-pco") as writer:
        CachedModel(sharp_model(), writer).generate(PROMPT, **GREEDY)
        writer.store.flush()
    with new_client(encoding="step0.0005-klt-pco") as client:
        cached = CachedModel(model, client)
        wait_for_calibration(cached)
        got = cached.generate(PROMPT, return_dict_in_generate=True, **GREEDY)
        assert got.sequences.shape == (1, 604)
        assert cached.last_report.reused_tokens == 512
        for layer, expected in zip(got.past_key_values.layers, plain.layers, strict=True):
            # The first tokens of the text, which everything attends to, are exact.
            torch.testing.assert_close(layer.keys[:, :, :4], expected.keys[:, :, :4], rtol=1e-5, atol=1e-5)
            for name in ("keys", "values"):
                exact = getattr(expected, name)[:, :, 4:512]
                error = (getattr(layer, name)[:, :, 4:512] - exact).square().mean() / exact.var()
                assert 0 < error < 5e-3
    cluster.check_nothing_is_held()


def test_a_question_reads_a_part_of_what_was_coded(
    stored: int, new_client: Callable[..., KVStoreClient]
) -> None:
    """The calibration has 3 periods of 2 layers; summaries are made when the prefix is reused in full."""
    with new_client() as client:
        cached = CachedModel(sharp_model(), client)
        wait_for_calibration(cached)
        options = {"return_dict_in_generate": True, "output_logits": True, **GREEDY}
        full = cached.generate(PROMPT, budget=0.5, **options)
        assert cached.last_report.reprefill is None
        assert cached.last_report.reused_tokens == 512
        cached.generate(PROMPT, budget=0.5, **GREEDY)
        part = cached.last_report.reprefill
        assert part is not None
        assert [len(frames) for frames in part.sets] == [4, 4, 4]
        assert part.bytes_needed < 0.6 * stored
        client.frame_cache.clear()
        whole = cached.generate(PROMPT, budget=1.0, **options)
        assert torch.equal(whole.sequences, full.sequences)
        for ours, theirs in zip(whole.logits, full.logits, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)
        cached.close()


def test_medium_is_small(stored: int, new_client: Callable[..., KVStoreClient]) -> None:
    with new_client() as client:
        cached = CachedModel(sharp_model(), client)
        wait_for_calibration(cached)
        before = client.metrics.snapshot()["bytes_in"]
        cached.generate(PROMPT, **GREEDY)
        assert cached.last_report.reused_tokens == 512
        fetched = client.metrics.snapshot()["bytes_in"] - before
        assert fetched < stored < 512 * cached.spec.kv_bytes_per_token / 10


def test_the_engine_does_not_wait_for_a_calibration_and_has_it_later(
    stored: int, cluster: ServedCluster, new_client: Callable[..., KVStoreClient]
) -> None:
    model = sharp_model()
    with ShapedLink(cluster.address, bandwidth_bps=1e9) as link, new_client(link.address) as client:
        slow_down(link, client)
        cached = CachedModel(model, client, store=False)
        link.set_bandwidth(0.2e6)
        answer = cached.generate(PROMPT, **GREEDY)
        assert loads(), "the calibration was waited for"
        assert torch.equal(answer, model.generate(PROMPT, **GREEDY))
        assert cached.last_report.reused_tokens == 0
        assert counted(client, "calibration_loading") == 1
        assert len(loads()) <= 2  # one finds the model's newest, one loads it, however often it is asked for
        link.set_bandwidth(1e9)
        wait_for_calibration(cached)
        cached.generate(PROMPT, **GREEDY)
        assert cached.last_report.reused_tokens == 512


def test_an_exact_copy_is_taken_while_the_calibration_is_not_there(
    stored: int, cluster: ServedCluster, new_client: Callable[..., KVStoreClient]
) -> None:
    model = sharp_model()
    with new_client(encoding="exact-zstd") as client:
        CachedModel(model, client).generate(PROMPT, **GREEDY)
        client.store.flush()
    with ShapedLink(cluster.address, bandwidth_bps=1e9) as link, new_client(link.address) as client:
        slow_down(link, client)
        cached = CachedModel(model, client, store=False)
        assert torch.equal(cached.generate(PROMPT, **GREEDY), model.generate(PROMPT, **GREEDY))
        assert cached.last_report.reused_tokens == 512
        assert counted(client, "calibration_loading") == 0
        link.set_bandwidth(1e9)
        wait_for_calibration(cached)
        match = client.match(cached.spec, client.chunk_ids(cached.spec, PROMPT[0].tolist()))
        client.release(match)
        offered = [[variant.header.encoding.name for variant in chunk.variants] for chunk in match.chunks]
        assert offered == [[MEDIUM, "exact-zstd"]] * 2  # as `accept` has them, under the fixed policy
    cluster.check_nothing_is_held()


def test_exact_and_coded_are_stored_side_by_side(
    cluster: ServedCluster, calibration: Calibration, new_client: Callable[..., KVStoreClient]
) -> None:
    publish(cluster.address, calibration)
    with new_client(encoding=f"exact-zstd,{MEDIUM}") as client:
        cached = CachedModel(sharp_model(), client)
        cached.generate(PROMPT, **GREEDY)
        client.store.flush()
        assert client.metrics.snapshot()["chunks_stored"] == 2
        match = client.match(cached.spec, client.chunk_ids(cached.spec, PROMPT[0].tolist()))
        client.release(match)
        for chunk in match.chunks:
            exact, medium = chunk.variants
            assert (exact.header.encoding.name, exact.klt) == ("exact-zstd", None)
            assert medium.header.encoding.name == MEDIUM
            assert medium.klt is not None
            assert medium.header.size_bytes < exact.header.size_bytes / 4
    assert cluster.stored_chunks() == 4
    cluster.check_nothing_is_held()


def test_without_a_calibration_nothing_is_stored_and_the_log_says_once_what_to_do(
    cluster: ServedCluster, new_client: Callable[..., KVStoreClient], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), new_client() as client:
        cached = CachedModel(tiny_model(), client)
        for seed in range(3):
            cached.generate(random_prompt(600, seed=seed), **GREEDY)
            client.store.flush()
        assert counted(client, "store_no_calibration") == 3
    assert cluster.stored_chunks() == 0
    (warning,) = (record.getMessage() for record in caplog.records)
    assert f"kvstore calibrate --dtype float32 --publish {cluster.address}" in warning


def test_a_calibration_published_later_is_found(
    cluster: ServedCluster, calibration: Calibration, new_client: Callable[..., KVStoreClient]
) -> None:
    with new_client() as client:
        cached = CachedModel(sharp_model(), client)
        cached.generate(PROMPT, **GREEDY)
        client.store.flush()
        publish(cluster.address, calibration)
        cached.generate(PROMPT, **GREEDY)
        client.store.flush()
        cached.generate(PROMPT, **GREEDY)
        assert cached.last_report.reused_tokens == 512


def test_a_calibration_damaged_on_the_disk_is_got_again(
    stored: int, calibration: Calibration, new_client: Callable[..., KVStoreClient], tmp_path: Path
) -> None:
    file = tmp_path / "damaged" / "calibrations" / f"{calibration.digest.hex()}.kvcal"
    file.parent.mkdir(parents=True)
    data = calibration.to_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with new_client(cache_dir=tmp_path / "damaged") as client:
        cached = CachedModel(sharp_model(), client)
        wait_for_calibration(cached)
        cached.generate(PROMPT, **GREEDY)
        assert cached.last_report.reused_tokens == 512
        assert counted(client, "calibration_cache_damaged") == 1
    assert file.read_bytes() == calibration.to_bytes()


def test_a_calibration_of_another_model_is_not_used(
    cluster: ServedCluster, calibration: Calibration, new_client: Callable[..., KVStoreClient]
) -> None:
    model = tiny_model(seed=3)
    with new_client() as client:
        cached = CachedModel(model, client)
        client.calibrations.publish(calibration.to_bytes(), cached.spec.digest)
        assert torch.equal(cached.generate(PROMPT, **GREEDY), model.generate(PROMPT, **GREEDY))
        client.store.flush()
        assert counted(client, "calibration_foreign") >= 1
        assert counted(client, "store_no_calibration") == 1
    assert cluster.stored_chunks() == 0


def test_chunks_of_another_calibration_are_replaced(
    stored: int, cluster: ServedCluster, calibration: Calibration, new_client: Callable[..., KVStoreClient]
) -> None:
    other = dataclasses.replace(calibration, provenance={"texts": ["others"]})
    publish(cluster.address, other)
    with new_client(accept=("exact-zstd",)) as writer:  # finds nothing, so it stores the same chunks again
        CachedModel(sharp_model(), writer).generate(PROMPT, **GREEDY)
        writer.store.flush()
    assert cluster.stored_chunks() == 2
    with new_client() as reader:
        cached = CachedModel(sharp_model(), reader)
        wait_for_calibration(cached)
        match = reader.match(cached.spec, reader.chunk_ids(cached.spec, PROMPT[0].tolist()))
        assert [chunk.header.calibration for chunk in match.chunks] == [other.digest] * 2
        reader.release(match)
        cached.generate(PROMPT, **GREEDY)
        assert cached.last_report.reused_tokens == 512
    cluster.check_nothing_is_held()


def test_bytes_that_are_no_calibration_are_read_once(
    cluster: ServedCluster, new_client: Callable[..., KVStoreClient]
) -> None:
    with new_client() as client:
        cached = CachedModel(tiny_model(), client)
        digest = client.calibrations.publish(b"no calibration", cached.spec.digest)
        for _ in range(3):
            assert client.prepare(cached.spec).result(10) is None
            assert client.ready_calibrations.klt(digest) is None
        assert counted(client, "calibration_unusable") == 1


def test_a_service_that_is_away_costs_nobody_anything(new_client: Callable[..., KVStoreClient]) -> None:
    model = tiny_model()
    with new_client("127.0.0.1:1", lookup_timeout_s=0.5) as client:
        cached = CachedModel(model, client)
        assert torch.equal(cached.generate(PROMPT, **GREEDY), model.generate(PROMPT, **GREEDY))
        client.store.flush()
        assert counted(client, "store_unreachable") == 1  # without its canary, nothing is handed to the store


def test_closing_in_the_middle_of_a_load_keeps_its_patience(
    stored: int, cluster: ServedCluster, new_client: Callable[..., KVStoreClient]
) -> None:
    spec = spec_of(sharp_model())
    kv = torch.randn(2, spec.layers, spec.kv_heads, CHUNK_TOKENS, spec.head_dim)
    with ShapedLink(cluster.address, bandwidth_bps=1e4) as link:
        client = new_client(link.address, close_timeout_s=0.3, calibration_timeout_s=60.0)
        new = [NewChunk(chunk_id, lambda: (kv[0], kv[1])) for chunk_id in client.chunk_ids(spec, range(600))]
        client.store.put(spec, new)  # and now the store waits for the calibration
        deadline = time.monotonic() + 10
        while not loads():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        started = time.monotonic()
        client.close()
        assert time.monotonic() - started < 30  # the load's own deadline is later
        assert counted(client, "store_dropped_at_close") == 1
        assert client.prepare(spec).result(1) is None


def test_a_fetch_without_features_misses_its_chunks(
    stored: int, new_client: Callable[..., KVStoreClient]
) -> None:
    with new_client() as client:
        cached = CachedModel(sharp_model(), client)
        wait_for_calibration(cached)
        match = client.match(cached.spec, client.chunk_ids(cached.spec, PROMPT[0].tolist()))
        assert len(match.chunks) == 2
        report = client.fetch(match, client.buffers.acquire(cached.spec, 512), None).wait()
        assert report.missing == {0: "calibration", 1: "calibration"}


def test_features_are_asked_for_once_though_a_frame_is_read_again(
    tmp_path: Path, calibration: Calibration, new_client: Callable[..., KVStoreClient]
) -> None:
    with served_cluster(tmp_path / "two", nodes=2, replicas=2) as cluster:
        publish(cluster.address, calibration)
        with new_client(cluster.address, decode_threads=1) as client:
            model = sharp_model()
            cached = CachedModel(model, client)
            cached.generate(PROMPT, **GREEDY)
            client.store.flush()
            match = client.match(cached.spec, client.chunk_ids(cached.spec, PROMPT[0].tolist()))
            chunk = match.chunks[0]
            node = next(node for node in cluster.nodes if node.node_id == chunk.member.node_id)
            with node.open(chunk.chunk_id, MEDIUM) as reader:
                flip_bit(next(reader.pieces(0, 1, 1 << 20))[0])
            asked: list[int] = []
            of_prompt = PromptFeatures(partial(embedded, model), PROMPT[0])

            def features(index: int) -> torch.Tensor:
                asked.append(index)
                return of_prompt(index)

            buffers = client.buffers.acquire(cached.spec, match.tokens)
            rotary = rotary_tables(model, match.tokens, cached.spec.dtype.torch, "cpu")
            assert client.fetch(match, buffers, rotary, features=features).wait().complete
            assert client.metrics.snapshot()["failover_checksum"] == 1
            assert sorted(asked) == [0, 1]


def test_chunks_stored_without_features_are_dropped(
    stored: int, cluster: ServedCluster, new_client: Callable[..., KVStoreClient]
) -> None:
    with new_client() as client:
        spec = CachedModel(sharp_model(), client).spec
        shape = (spec.layers, spec.kv_heads, 256, spec.head_dim)
        (chunk_id,) = client.chunk_ids(spec, random_prompt(256, seed=5)[0].tolist())
        chunk = NewChunk(chunk_id, lambda: (torch.randn(shape), torch.randn(shape)))
        assert client.store.put(spec, [chunk]).result(10) == 0
        assert counted(client, "store_unencodable") == 1


def test_what_is_stored_is_accepted_unless_said_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ClientSettings().encodings.accept == ("exact-zstd",)
    assert ClientSettings(encoding=MEDIUM).encodings.accept == (MEDIUM, "exact-zstd")
    assert ClientSettings(encoding=MEDIUM, accept=("exact-zstd",)).encodings.accept == ("exact-zstd",)
    monkeypatch.setenv("KVSTORE_ENCODING", MEDIUM)
    assert ClientSettings().encodings.accept == (MEDIUM, "exact-zstd")
    monkeypatch.setenv("KVSTORE_ACCEPT", "high-klt-pco, exact-zstd")
    assert ClientSettings().encodings.accept == ("high-klt-pco", "exact-zstd")
