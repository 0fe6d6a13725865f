"""KV coded with a calibration goes from one worker to another."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from kvstore_client import ClientSettings, KVStoreClient
from kvstore_client.engines.transformers import CachedModel
from kvstore_client.engines.transformers.features import embedded
from kvstore_client.engines.transformers.rotary import rotary_tables
from kvstore_client.new_chunk import NewChunk
from kvstore_client.reuse.features import PromptFeatures
from kvstore_codec.calibration import Calibration
from tests.client.conftest import ServedCluster, served_cluster
from tests.client.klt.calibrated import (
    GREEDY,
    MEDIUM,
    PROMPT,
    counted,
    publish,
    sharp_model,
    wait_for_calibration,
)
from tests.client.models import random_prompt
from tests.damage import flip_bit

pytestmark = pytest.mark.usefixtures("one_thread")


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
        assert client.store.put(spec, [chunk]).result(60) == 0
        assert counted(client, "store_unencodable") == 1


def test_what_is_stored_is_accepted_unless_said_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ClientSettings().encodings.accept == ("exact-zstd",)
    assert ClientSettings(encoding=MEDIUM).encodings.accept == (MEDIUM, "exact-zstd")
    assert ClientSettings(encoding=MEDIUM, accept=("exact-zstd",)).encodings.accept == ("exact-zstd",)
    monkeypatch.setenv("KVSTORE_ENCODING", MEDIUM)
    assert ClientSettings().encodings.accept == (MEDIUM, "exact-zstd")
    monkeypatch.setenv("KVSTORE_ACCEPT", "high-klt-pco, exact-zstd")
    assert ClientSettings().encodings.accept == ("high-klt-pco", "exact-zstd")
