"""A hit of a model with sliding windows reads the KV in its windows, and the answer is the model's own."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.generation.utils import GenerateDecoderOnlyOutput

import kvstore_codec.codec
from kvstore_bench.shaping import ShapedLink
from kvstore_client import KVStoreClient, connect
from kvstore_client.buffers import BufferPool, KVBuffers
from kvstore_client.contiguous.summaries import SummaryShape
from kvstore_client.engines.transformers import CachedModel
from kvstore_client.engines.transformers.rotary import rotary_tables
from kvstore_client.match import StoredChunk
from kvstore_codec.geometry import PERIOD_LAYERS
from kvstore_codec.model_spec import ModelSpec
from tests.client.conftest import ServedCluster
from tests.client.models import random_prompt, tiny_model
from tests.damage import flip_bit

pytestmark = pytest.mark.usefixtures("one_thread", "unwritten_is_nan")

WINDOW, CHUNKS = 256, 4
GEMMA = ["sliding_attention"] * 5 + ["full_attention"]
FULL_LAYER = 5
MODELS: dict[str, dict[str, Any]] = {
    "gemma3": {"num_hidden_layers": 12, "layer_types": GEMMA * 2, "head_dim": 32},
    "mistral-windows": {"num_hidden_layers": 6},
}
STEPS = {
    "do_sample": False,
    "max_new_tokens": 6,
    "return_dict_in_generate": True,
    "output_logits": True,
}
Connect = Callable[..., KVStoreClient]


@pytest.fixture
def unwritten_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that nobody writes holds NaN."""
    plain = BufferPool.acquire

    def acquire(pool: BufferPool, spec: ModelSpec, tokens: int) -> KVBuffers:
        buffers = plain(pool, spec, tokens)
        buffers.keys.fill_(torch.nan)
        buffers.values.fill_(torch.nan)
        return buffers

    monkeypatch.setattr(BufferPool, "acquire", acquire)


@pytest.fixture
def new_client(cluster: ServedCluster) -> Iterator[Connect]:
    with ExitStack() as stack:

        def new(**settings: Any) -> KVStoreClient:
            return stack.enter_context(connect(cluster.address, **{"fetch_policy": "fixed", **settings}))

        yield new
        cluster.check_nothing_is_held()


def model_of(family: str, window: int = WINDOW) -> PreTrainedModel:
    """Random weights, large enough for the model to mind what its KV is."""
    model = tiny_model(family, **{**MODELS[family], "sliding_window": window})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model


def store(client: KVStoreClient, model: PreTrainedModel, prompt: torch.Tensor) -> None:
    cached = CachedModel(model, client)
    cached.generate(prompt, do_sample=False, max_new_tokens=1)
    client.store.flush()
    cached.close()


def chunks_of(client: KVStoreClient, spec: ModelSpec, prompt: torch.Tensor) -> tuple[StoredChunk, ...]:
    return client.match(spec, client.chunk_ids(spec, prompt[0].tolist()), peek=True).chunks


def sizes(chunks: tuple[StoredChunk, ...], spec: ModelSpec, *computed_from: int) -> tuple[float, int]:
    """Bytes of the KV that full layers and windows need before these positions, and of all KV."""
    needed, whole = 0.0, 0
    for chunk in chunks:
        geometry = chunk.header.geometry
        for frame, size in enumerate(chunk.header.frame_lengths):
            period, slot = divmod(frame, geometry.frames_per_period)
            layers = geometry.layers_of(period)
            tokens = [chunk.first_token + token for token in geometry.tokens_of(slot)]
            wanted = sum(
                window is None or any(first - window < token < first for first in computed_from)
                for window in spec.sliding_windows[layers.start : layers.stop]
                for token in tokens
            )
            needed += size * wanted / (len(layers) * len(tokens))
            whole += size
    return needed, whole


def damage(cluster: ServedCluster, chunk: StoredChunk, layer: int) -> None:
    """Turn over a bit of this layer's first frame."""
    geometry = chunk.header.geometry
    frame = layer // geometry.period_layers * geometry.frames_per_period
    with cluster.nodes[0].open(chunk.chunk_id, chunk.header.encoding.name) as reader:
        flip_bit(next(reader.pieces(frame, 1, 1 << 20))[0])


def require_same(got: GenerateDecoderOnlyOutput, expected: GenerateDecoderOnlyOutput) -> None:
    assert torch.equal(got.sequences, expected.sequences)
    for ours, theirs in zip(got.logits, expected.logits, strict=True):
        one, other = theirs[0].log_softmax(-1), ours[0].log_softmax(-1)
        assert abs(float((one.exp() * (one - other)).sum())) < 1e-6


@pytest.mark.parametrize("encoding", ["exact-zstd", "exact-raw@32", "medium-zstd"])
@pytest.mark.parametrize("family", MODELS)
def test_a_hit_reads_its_windows_and_full_layers(
    cluster: ServedCluster, new_client: Connect, family: str, encoding: str
) -> None:
    model, prompt = model_of(family), random_prompt(CHUNKS * 256 + 20)
    client = new_client(encoding=encoding)
    store(client, model, prompt)
    cached = CachedModel(model, client, store=False)
    spec, chunks = cached.spec, chunks_of(client, cached.spec, prompt)
    needed, whole = sizes(chunks, spec, CHUNKS * 256)

    before = cluster.nodes[0].stats().counters["bytes_out"]
    got = cached.generate(prompt, **STEPS)
    sent = cluster.nodes[0].stats().counters["bytes_out"] - before
    report = cached.last_report.fetch
    assert report is not None
    assert report.complete
    assert cached.last_report.reused_tokens == CHUNKS * 256
    assert sent == report.received_bytes
    assert needed <= report.received_bytes <= 1.1 * needed
    assert whole > 2.4 * report.received_bytes, "what was read before"

    # All KV, read without windows, and masked by the model.
    match = client.match(spec, client.chunk_ids(spec, prompt[0].tolist()))
    buffers = client.buffers.acquire(spec, match.tokens)
    all_kv = client.fetch(match, buffers, rotary_tables(model, match.tokens, spec.dtype.torch, "cpu")).wait()
    assert (all_kv.complete, all_kv.received_bytes) == (True, whole)
    cache = DynamicCache()
    for layer in range(spec.layers):
        cache.update(buffers.keys[layer][None], buffers.values[layer][None], layer)
    require_same(got, model.generate(prompt, past_key_values=cache, **STEPS))
    if encoding.startswith("exact"):
        require_same(got, model.generate(prompt, **STEPS))
    cached.close()


@pytest.mark.parametrize(("window", "behind"), [(2, 0), (64, 20), (65, 0), (257, 0), (257, 20), (4000, 20)])
@pytest.mark.parametrize("family", MODELS)
def test_any_window_is_enough(new_client: Connect, family: str, window: int, behind: int) -> None:
    """Also where the prompt ends with its last stored chunk, whose last token is computed again."""
    model, prompt = model_of(family, window), random_prompt(3 * 256 + behind)
    client = new_client()
    store(client, model, prompt)
    cached = CachedModel(model, client, store=False)
    got = cached.generate(prompt, **STEPS)
    assert cached.last_report.reused_tokens == (3 * 256 if behind else 3 * 256 - 1)
    require_same(got, model.generate(prompt, **STEPS))
    cached.close()


@pytest.mark.parametrize("lost", [{0}, {3}, {1, 2}, {0, 2}, {0, 1, 2}, set(range(CHUNKS))])
def test_what_is_computed_in_place_of_a_lost_chunk_has_its_window(
    cluster: ServedCluster, new_client: Connect, lost: set[int]
) -> None:
    model, prompt = model_of("gemma3"), random_prompt(CHUNKS * 256 + 20)
    client = new_client(retry_after_s=0.0)
    store(client, model, prompt)
    cached = CachedModel(model, client, store=False)
    chunks = chunks_of(client, cached.spec, prompt)
    for index in lost:
        damage(cluster, chunks[index], FULL_LAYER)
    got = cached.generate(prompt, **STEPS)
    report = cached.last_report.fetch
    assert report is not None
    assert dict(report.missing) == dict.fromkeys(lost, "checksum")
    assert report.fetched == CHUNKS - len(lost), "only what is damaged is computed"
    needed, _ = sizes(chunks, cached.spec, CHUNKS * 256, *(256 * index for index in lost))
    assert report.received_bytes <= 1.1 * needed
    require_same(got, model.generate(prompt, **STEPS))
    cached.close()


def test_damage_outside_the_windows_of_all_layers_is_not_even_read(
    cluster: ServedCluster, new_client: Connect
) -> None:
    model, prompt = model_of("mistral-windows"), random_prompt(CHUNKS * 256 + 20)
    client = new_client()
    store(client, model, prompt)
    cached = CachedModel(model, client, store=False)
    for chunk in chunks_of(client, cached.spec, prompt)[: CHUNKS - 1]:
        damage(cluster, chunk, 0)
    got = cached.generate(prompt, **STEPS)
    assert cached.last_report.reused_tokens == CHUNKS * 256
    assert cached.last_report.fetch is not None
    assert cached.last_report.fetch.complete
    require_same(got, model.generate(prompt, **STEPS))
    cached.close()


def test_chunks_with_periods_that_mix_windows_are_still_read(
    new_client: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As earlier versions stored them."""
    model, prompt = model_of("gemma3"), random_prompt(CHUNKS * 256 + 20)
    client = new_client()
    with monkeypatch.context() as earlier:
        earlier.setattr(kvstore_codec.codec, "period_layers_of", lambda *_: PERIOD_LAYERS)
        store(client, model, prompt)
    cached = CachedModel(model, client, store=False)
    chunks = chunks_of(client, cached.spec, prompt)
    assert {chunk.header.geometry.period_layers for chunk in chunks} == {PERIOD_LAYERS}
    got = cached.generate(prompt, **STEPS)
    assert cached.last_report.reused_tokens == CHUNKS * 256
    assert cached.last_report.fetch is not None
    needed, whole = sizes(chunks, cached.spec, CHUNKS * 256)
    assert 1.1 * needed < cached.last_report.fetch.received_bytes < 0.8 * whole
    require_same(got, model.generate(prompt, **STEPS))
    cached.close()


@pytest.mark.parametrize("family", MODELS)
def test_what_is_computed_behind_a_window_is_stored(
    cluster: ServedCluster, new_client: Connect, family: str
) -> None:
    model, prompt = model_of(family, window=100), random_prompt(3 * 256 + 250)
    client = new_client()
    store(client, model, prompt[:, : 3 * 256])
    cached = CachedModel(model, client)
    longer = cached.generate(prompt, do_sample=False, max_new_tokens=12)
    assert cached.last_report.reused_tokens == 3 * 256
    client.store.flush()
    assert cluster.stored_chunks() == 4
    prompt = torch.cat((longer, random_prompt(20, seed=1)), 1)
    got = cached.generate(prompt, **STEPS)
    assert cached.last_report.reused_tokens == 4 * 256
    require_same(got, model.generate(prompt, **STEPS))
    cached.close()


def test_no_key_summaries_are_made_of_what_was_not_read(new_client: Connect) -> None:
    model, prompt = model_of("gemma3", window=100), random_prompt(3 * 256 + 20)
    client = new_client()
    store(client, model, prompt)
    cached = CachedModel(model, client)
    shape = SummaryShape.of(chunks_of(client, cached.spec, prompt)[0].header.geometry)
    require_same(cached.generate(prompt, budget=0.25, **STEPS), model.generate(prompt, **STEPS))
    assert cached.last_report.reused_tokens == 3 * 256
    ids = client.chunk_ids(cached.spec, prompt[0].tolist())
    assert not client.summaries.known([one.prefix_id for one in ids], shape).summaries
    cached.close()


@pytest.mark.parametrize("family", MODELS)
def test_the_returned_cache_is_like_the_models_own(new_client: Connect, family: str) -> None:
    model, prompt = model_of(family, window=100), random_prompt(3 * 256 + 20)
    client = new_client()
    store(client, model, prompt)
    cached = CachedModel(model, client, store=False)
    got, expected = cached.generate(prompt, **STEPS), model.generate(prompt, **STEPS)
    for ours, theirs in zip(got.past_key_values.layers, expected.past_key_values.layers, strict=True):
        assert type(ours) is type(theirs)
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert ours.keys.shape == theirs.keys.shape
        torch.testing.assert_close(ours.values, theirs.values, rtol=1e-4, atol=1e-4)
    further = torch.cat((got.sequences, random_prompt(20, seed=1)), 1)
    continued = [model.generate(further, past_key_values=o.past_key_values, **STEPS) for o in (got, expected)]
    require_same(*continued)
    cached.close()


@pytest.mark.parametrize("bandwidth_bps", [4e6, 10e9])
@pytest.mark.parametrize("family", MODELS)
def test_a_planned_fetch_says_the_same(
    cluster: ServedCluster, new_client: Connect, family: str, bandwidth_bps: float
) -> None:
    model, prompt = model_of(family, window=300), random_prompt(CHUNKS * 256 + 20)
    store(new_client(), model, prompt)
    endpoint = cluster.servers[0].address
    with ShapedLink(endpoint, bandwidth_bps=bandwidth_bps) as link:
        client = new_client(fetch_policy="adaptive", routes={endpoint: link.address})
        cached = CachedModel(model, client, store=False)
        expected = model.generate(prompt, **STEPS)
        for _ in range(2):  # the second knows the link
            require_same(cached.generate(prompt, **STEPS), expected)
        cached.close()
        cluster.check_nothing_is_held()  # while the link still carries what gives leases back
