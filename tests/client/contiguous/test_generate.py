"""`generate` with a budget, through a real service: what it attends to, and what becomes of lost frames."""

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from kvstore_client import KVStoreClient, connect
from kvstore_client.contiguous.report import ReprefillReport
from kvstore_client.contiguous.summaries import SummaryShape
from kvstore_client.engines.transformers import CachedModel
from kvstore_client.engines.transformers.cache import PartialLayer
from kvstore_codec.codec import chunk_geometry
from kvstore_codec.encoding import Encoding
from kvstore_codec.errors import ConfigurationError
from kvstore_codec.geometry import Geometry
from kvstore_codec.identity import ChunkId
from kvstore_codec.page import PageNamespace
from tests.client.conftest import ServedCluster
from tests.client.models import random_prompt, tiny_model
from tests.damage import flip_bit

pytestmark = pytest.mark.usefixtures("one_thread")

GREEDY = {"do_sample": False, "max_new_tokens": 6}
PATIENT = {"lookup_timeout_s": 20.0, "stall_timeout_s": 60.0, "fetch_timeout_s": 60.0, "retry_after_s": 0.0}
DOCUMENT, QUESTION = random_prompt(6 * 256, seed=1), random_prompt(30, seed=2)
PROMPT = torch.cat([DOCUMENT, QUESTION], 1)
FRAMES = 24


@pytest.fixture
def client(cluster: ServedCluster) -> Iterator[KVStoreClient]:
    with connect(cluster.address, **PATIENT) as client:
        yield client


def prepared(client: KVStoreClient, model: PreTrainedModel) -> CachedModel:
    """A wrapped model whose DOCUMENT is stored, with its key summaries."""
    cached = CachedModel(model, client)
    cached.generate(DOCUMENT, budget=0.25, max_new_tokens=1, do_sample=False)
    client.store.flush()
    return cached


def answer(cached: CachedModel, budget: float, **options: Any) -> tuple[Any, ReprefillReport]:
    output = cached.generate(PROMPT, budget=budget, **GREEDY, **options)
    report = cached.last_report.reprefill
    assert report is not None, cached.last_report
    return output, report


def partial_reference(
    model: PreTrainedModel, sets: list[list[int]], frame_tokens: int = 64, period_layers: int = 4
) -> torch.Tensor:
    """The model's own answer over a cache with these frames only."""
    whole, part = DynamicCache(), DynamicCache()
    with torch.inference_mode():
        model(DOCUMENT, past_key_values=whole)
    for index, layer in enumerate(whole.layers):
        frames = sets[index // period_layers]
        kept = torch.cat([torch.arange(frame_tokens) + frame * frame_tokens for frame in frames])
        reduced = PartialLayer(DOCUMENT.shape[1] - len(kept))
        reduced.lazy_initialization(layer.keys, layer.values)
        reduced.keys, reduced.values = layer.keys[:, :, kept], layer.values[:, :, kept]
        part.layers.append(reduced)
    return model.generate(PROMPT, past_key_values=part, **GREEDY)


@pytest.mark.parametrize("family", ["llama", "llama3-rope", "qwen2", "qwen3", "mistral"])
def test_the_whole_budget_is_full_reuse(client: KVStoreClient, family: str) -> None:
    model = tiny_model(family)
    cached = prepared(client, model)
    full = cached.generate(PROMPT, return_dict_in_generate=True, output_logits=True, **GREEDY)
    assert cached.last_report.reprefill is None
    output, report = answer(cached, 1.0, return_dict_in_generate=True, output_logits=True)
    assert torch.equal(output.sequences, full.sequences)
    for ours, theirs in zip(output.logits, full.logits, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)
    assert report.attended_tokens == report.prefix_tokens == DOCUMENT.shape[1]
    assert report.sets == [list(range(FRAMES))] * 2
    cached.close()


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_part_is_attended_to_at_its_positions(client: KVStoreClient, family: str) -> None:
    model = tiny_model(family)
    cached = prepared(client, model)
    output, report = answer(cached, 0.25)
    assert [len(frames) for frames in report.sets] == [6, 6]
    for frames in report.sets:
        assert frames[0] == 0
        assert frames[-1] == FRAMES - 1
    assert torch.equal(output, partial_reference(model, report.sets))
    assert report.attended_tokens == 6 * 64
    cached.close()


@pytest.mark.parametrize(("encoding", "period_layers"), [("exact-zstd@16", 4), ("exact-zstd@16x2", 2)])
def test_a_prefix_of_small_frames_is_chosen_from(
    cluster: ServedCluster, encoding: str, period_layers: int
) -> None:
    """Its summaries are those of any other number of tokens. Each period of layers has a set of its own."""
    model = tiny_model("llama")
    with connect(cluster.address, **PATIENT, encoding=encoding, accept=encoding) as client:
        cached = prepared(client, model)
        output, report = answer(cached, 0.25)
        layers = model.config.num_hidden_layers
        assert [len(frames) for frames in report.sets] == [24] * -(-layers // period_layers)
        reference = partial_reference(model, report.sets, frame_tokens=16, period_layers=period_layers)
        assert torch.equal(output, reference)
        cached.close()


@pytest.mark.parametrize("budget", [0.25, None], ids=["computed", "reused"])
def test_every_stored_encoding_can_be_chosen_from(cluster: ServedCluster, budget: float | None) -> None:
    """Which one a question is read in depends on the link; other periods have other summaries."""
    encodings = "exact-zstd@16x2,low-zstd"
    with connect(cluster.address, **PATIENT, encoding=encodings, accept=encodings) as client:
        cached = CachedModel(tiny_model("llama"), client)
        cached.generate(DOCUMENT, budget=budget, **GREEDY)
        client.store.flush()
        if budget is None:
            cached.generate(PROMPT, budget=0.25, **GREEDY)
            assert cached.last_report.reused_tokens == DOCUMENT.shape[1]
        names = [chunk.prefix_id for chunk in client.chunk_ids(cached.spec, DOCUMENT[0].tolist())]
        shapes = {
            SummaryShape.of(chunk_geometry(cached.spec, 256, Encoding.parse(name)))
            for name in encodings.split(",")
        }
        assert len(shapes) == 2
        assert all(len(client.summaries.known(names, shape).summaries) == 6 for shape in shapes)
        cached.close()


def test_a_model_of_too_many_layers_for_small_frames_is_answered(cluster: ServedCluster) -> None:
    """Of a chunk in frames of one token and one layer there would be 4,352."""
    model = tiny_model("llama", num_hidden_layers=17)
    with connect(cluster.address, **PATIENT, encoding="exact-zstd@1x1", accept="exact-zstd@1x1") as client:
        cached = CachedModel(model, client)
        output = cached.generate(PROMPT, budget=0.25, **GREEDY)
        assert torch.equal(output, model.generate(PROMPT, **GREEDY))
        cached.close()


def test_what_is_left_out_is_masked(client: KVStoreClient) -> None:
    """Against a mask over the whole prompt: one period, so that all layers have one set."""
    model = tiny_model("llama", num_hidden_layers=4)
    cached = prepared(client, model)
    output, report = answer(cached, 0.2, return_dict_in_generate=True, output_logits=True)
    kept = torch.zeros(PROMPT.shape[1], dtype=torch.bool)
    kept[DOCUMENT.shape[1] :] = True
    for frame in report.sets[0]:
        kept[frame * 64 : frame * 64 + 64] = True
    cache = DynamicCache()
    question = QUESTION.shape[1]
    seen = kept & torch.ones(question, PROMPT.shape[1], dtype=torch.bool).tril(DOCUMENT.shape[1])
    mask = torch.zeros(seen.shape).masked_fill(~seen, float("-inf"))[None, None]
    with torch.inference_mode():
        model(DOCUMENT, past_key_values=cache)
        positions = torch.arange(DOCUMENT.shape[1], PROMPT.shape[1])[None]
        logits = model(QUESTION, past_key_values=cache, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(output.logits[0], logits[:, -1], atol=2e-5, rtol=1e-4)
    cached.close()


def test_a_returned_cache_continues_the_text(client: KVStoreClient) -> None:
    model = tiny_model()
    cached = prepared(client, model)
    output, _ = answer(cached, 0.25, return_dict_in_generate=True)
    longer = torch.cat([output.sequences, random_prompt(9, seed=3)], 1)
    again = model.generate(longer, past_key_values=output.past_key_values, **GREEDY)
    assert output.past_key_values.get_seq_length() == again.shape[1] - 1
    assert output.past_key_values.layers[0].keys.shape[2] == again.shape[1] - 1 - (FRAMES - 6) * 64
    cached.close()


def test_another_worker_finds_the_summaries(cluster: ServedCluster, client: KVStoreClient) -> None:
    prepared(client, tiny_model()).close()
    with connect(cluster.address, **PATIENT) as other:
        cached = CachedModel(tiny_model(), other)
        _, report = answer(cached, 0.25)
        assert report.summary_bytes > 0
        assert report.bytes_read >= report.bytes_needed + report.summary_bytes
        _, again = answer(cached, 0.25)
        assert again.summary_bytes == 0
        assert again.frames_cached == again.frames_needed == 12
        assert again.bytes_needed == 0
        cached.close()


def test_without_summaries_the_prefix_is_reused_in_full_once(
    cluster: ServedCluster, client: KVStoreClient
) -> None:
    first = CachedModel(tiny_model(), client)
    expected = first.generate(PROMPT, **GREEDY)
    client.store.flush()
    first.close()
    with connect(cluster.address, **PATIENT) as other:
        cached = CachedModel(tiny_model(), other)
        assert torch.equal(cached.generate(PROMPT, budget=0.25, **GREEDY), expected)
        assert cached.last_report.reprefill is None
        assert cached.last_report.reused_tokens == DOCUMENT.shape[1]
        answer(cached, 0.25)
        cached.close()


def test_summaries_of_the_first_version_are_ignored(cluster: ServedCluster, client: KVStoreClient) -> None:
    """These have the right names, and even the size of today's."""
    first = CachedModel(tiny_model(), client)
    expected = first.generate(PROMPT, **GREEDY)
    client.store.flush()
    geometry, spec = Geometry.of(first.spec), first.spec
    layout = (
        f"key-summary.v1 mean+deviation i8 f32 period{geometry.period_layers} unit32 "
        f"{geometry.periods}x{spec.kv_heads}x8x{spec.head_dim}"
    )
    names = [chunk.prefix_id for chunk in client.chunk_ids(spec, DOCUMENT[0].tolist())]
    pages = client.pages(PageNamespace(spec.digest, layout))
    assert all(pages.put(names, [bytes(SummaryShape.of(geometry).size_bytes)] * len(names)).ok)
    first.close()
    with connect(cluster.address, **PATIENT) as other:
        cached = CachedModel(tiny_model(), other)
        assert torch.equal(cached.generate(PROMPT, budget=0.25, **GREEDY), expected)
        assert cached.last_report.reprefill is None
        answer(cached, 0.25)
        cached.close()


def test_nothing_of_a_partial_answer_is_stored(cluster: ServedCluster, client: KVStoreClient) -> None:
    cached = prepared(client, tiny_model())
    stored = cluster.stored_chunks()
    longer = torch.cat([DOCUMENT, random_prompt(300, seed=7)], 1)
    cached.generate(longer, budget=0.25, **GREEDY)
    assert cached.last_report.reprefill is not None
    client.store.flush()
    assert cluster.stored_chunks() == stored
    assert client.metrics.snapshot()["miss_store_behind_part"] == 1
    cached.close()


def test_nodes_hear_of_the_attention(cluster: ServedCluster, client: KVStoreClient) -> None:
    cached = prepared(client, tiny_model())
    node, heard, came = cluster.nodes[0], {}, threading.Event()
    report = node.report

    def listen(chunks: Sequence[ChunkId], scores: Sequence[float], tenant: str = "") -> None:
        report(chunks, scores, tenant)
        heard.update(zip(chunks, scores, strict=True))
        came.set()

    node.report = listen  # type: ignore[method-assign]
    _, found = answer(cached, 0.25)
    assert came.wait(20)
    read = {frame // 4 for frames in found.sets for frame in frames}
    ids = client.chunk_ids(cached.spec, DOCUMENT[0].tolist())
    assert {ids[index] for index in read} <= heard.keys() <= set(ids)
    assert all(0 <= score <= 1 for score in heard.values())
    assert sum(heard.values()) == pytest.approx(sum(heard[ids[index]] for index in read))
    assert sum(heard.values()) > 0.2
    cached.close()


def chunk_of(client: KVStoreClient, cached: CachedModel, index: int) -> ChunkId:
    return client.chunk_ids(cached.spec, DOCUMENT[0].tolist())[index]


def test_a_damaged_frame_leaves_the_set(cluster: ServedCluster, client: KVStoreClient) -> None:
    model = tiny_model()
    cached = prepared(client, model)
    _, before = answer(cached, 0.5)
    client.frame_cache.clear()
    victim = before.sets[1][5]
    with cluster.nodes[0].open(chunk_of(client, cached, victim // 4), "exact-zstd") as reader:
        flip_bit(next(reader.pieces(4 + victim % 4, 1, 1 << 20))[0])
    _, report = answer(cached, 0.5)
    assert report.frames_missing == 1
    assert report.sets[1] == [frame for frame in before.sets[1] if frame != victim]
    assert [len(frames) for frames in report.sets] == [11, 11]
    assert set(report.sets[0]) < set(before.sets[0])
    assert client.metrics.snapshot()["frames_missing"] == 1
    cached.close()


def test_a_prefix_that_is_gone_is_computed(cluster: ServedCluster, client: KVStoreClient) -> None:
    model = tiny_model()
    cached = prepared(client, model)
    pending = cached.begin(PROMPT, budget=0.25, **GREEDY)
    for server in (*cluster.servers, *cluster.bulk):
        server.stop(0)
    assert torch.equal(cached.finish(pending), model.generate(PROMPT, **GREEDY))
    assert cached.last_report.reprefill is None
    assert client.metrics.snapshot()["miss_reprefill_incomplete"] == 1
    cached.close()


@pytest.mark.parametrize("family", ["mistral-windows", "qwen2-windows", "gemma3"])
def test_models_with_windows_reuse_in_full(
    cluster: ServedCluster, client: KVStoreClient, family: str
) -> None:
    model = tiny_model(family)
    cached = prepared(client, model)
    assert cluster.stored_chunks() == 6  # and no summaries
    assert torch.equal(cached.generate(PROMPT, budget=0.25, **GREEDY), model.generate(PROMPT, **GREEDY))
    assert cached.last_report.reprefill is None
    assert cached.last_report.reused_tokens == DOCUMENT.shape[1]
    cached.close()


@pytest.mark.parametrize("budget", [0, -0.1, 1.1, float("nan")])
def test_a_budget_out_of_range_is_refused(client: KVStoreClient, budget: float) -> None:
    cached = CachedModel(tiny_model(), client)
    with pytest.raises(ConfigurationError, match="budget"):
        cached.generate(PROMPT, budget=budget, **GREEDY)
    cached.close()


def test_the_setting_gives_the_budget(cluster: ServedCluster, client: KVStoreClient) -> None:
    prepared(client, tiny_model()).close()
    with connect(cluster.address, budget=0.25, **PATIENT) as other:
        cached = CachedModel(tiny_model(), other)
        cached.generate(PROMPT, **GREEDY)
        assert cached.last_report.reprefill is not None
        assert cached.last_report.reprefill.budget == 0.25
        cached.close()
