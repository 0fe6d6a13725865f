"""Models that differ in what KV is made of (heads, norms, windows, RoPE) are calibrated, coded and continued alike."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from kvstore_client import connect
from kvstore_client.engines.transformers import CachedModel
from kvstore_client.engines.transformers.calibrate import ObservedModel
from kvstore_client.engines.transformers.features import embedded
from kvstore_client.engines.transformers.rotary import rotary_tables
from kvstore_client.reuse.features import PromptFeatures
from kvstore_codec.codec import EncodedChunk, decode_frames, encode_chunk
from kvstore_codec.encoding import Encoding
from kvstore_codec.identity import ChunkId, ContentId, PrefixId
from kvstore_codec.klt_frames import KLT
from kvstore_service.calibration import Options, calibrate, plan_passages
from tests.client.conftest import ServedCluster
from tests.client.models import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

KV = tuple[torch.Tensor, torch.Tensor]

CHUNK_ID = ChunkId(ContentId(bytes(32)), PrefixId(bytes(32)))
MEDIUM = Encoding.parse("medium-klt-pco")
KL_OF_MEDIUM = 0.02
CONTEXT, CONTINUED = 256, 64
# Layers in another order.
SWAPPED = [1, 0, 2, 3, 4]
KINDS = ["qwen3", "qwen2-windows", "mistral-windows", "gemma3"]


STEPS = {
    "do_sample": False,
    "max_new_tokens": 8,
    "return_dict_in_generate": True,
    "output_logits": True,
}


class Silent:
    def advance(self, stage: str, done: int, total: int) -> None: ...

    def note(self, text: str) -> None: ...


def text(tokens: int, seed: int) -> torch.Tensor:
    """Phrases that come again, i64 `[tokens]`, of one language for all seeds."""
    phrases = torch.randint(2, 512, (40, 8), generator=torch.Generator().manual_seed(99))
    order = torch.randint(0, len(phrases), (tokens // 8 + 1,), generator=torch.Generator().manual_seed(seed))
    return phrases[order].flatten()[:tokens]


@dataclass(frozen=True)
class Coded:
    """One text after its KV was encoded and decoded."""

    observed: ObservedModel
    klt: KLT
    exact: KV
    decoded: KV
    chunk: EncodedChunk
    continuation: torch.Tensor

    def kl(self, keys: torch.Tensor, values: torch.Tensor) -> float:
        """What the model says behind this KV instead of the exact one, nats a token."""
        exact, other = (
            self.observed.log_probabilities(*kv, self.continuation) for kv in (self.exact, (keys, values))
        )
        return divergence(exact, other)


def sharp(family: str) -> PreTrainedModel:
    """Random weights, but large enough for the model to mind what its KV is."""
    model = tiny_model(family)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    return model


def decode(chunk: EncodedChunk, klt: KLT, features: torch.Tensor, like: torch.Tensor) -> KV:
    geometry, prediction = chunk.header.geometry, klt.predict(features)
    keys, values = torch.full_like(like, torch.nan), torch.full_like(like, torch.nan)
    for period in range(geometry.periods):
        layers, first = geometry.layers_of(period), period * geometry.frames_per_period
        data = b"".join(chunk.parts[1 + first : 1 + first + geometry.frames_per_period])
        outs = (part[layers.start : layers.stop] for part in (keys, values))
        decode_frames(
            chunk.header, first, geometry.frames_per_period, data, *outs, klt=klt, prediction=prediction
        )
    return keys, values


@pytest.fixture(scope="module", params=KINDS)
def coded(request: pytest.FixtureRequest) -> Coded:
    observed = ObservedModel(sharp(request.param))
    plan = plan_passages([text(3200, seed=seed) for seed in range(2)], 10**6, CONTEXT + CONTINUED)
    klt = KLT(calibrate(observed, plan, Options(period_layers=2, rank=16), Silent()))
    unseen = text(CONTEXT + CONTINUED, seed=3)
    seen = observed.prefill(unseen[:CONTEXT])
    chunk = encode_chunk(
        seen.keys,
        seen.values,
        spec=observed.spec,
        chunk_id=CHUNK_ID,
        encoding=MEDIUM,
        klt=klt,
        features=seen.features,
        sinks=klt.calibration.sinks,
    )
    decoded = decode(chunk, klt, seen.features, seen.keys)
    return Coded(observed, klt, (seen.keys, seen.values), decoded, chunk, unseen[CONTEXT:])


def test_calibrated_kv_is_small_and_says_the_same(coded: Coded) -> None:
    """The rate's KL divergence is kept, at twice the most; KV of other layers or positions is far beyond that."""
    keys, values = coded.decoded
    assert not coded.chunk.guarded.get("exact")
    assert 8 * coded.chunk.size_bytes < 4 * 2 * keys.numel(), "4 bits a value"
    assert 1e-4 < coded.kl(keys, values) < 2 * KL_OF_MEDIUM
    for mixed in (
        (keys[SWAPPED], values),
        (keys, values[SWAPPED]),
        (keys.roll(1, dims=0), values.roll(1, dims=0)),
        (keys.roll(CONTEXT // 2, dims=2), values.roll(CONTEXT // 2, dims=2)),
        (keys, values.roll(1, dims=2)),
    ):
        assert coded.kl(*mixed) > 4 * KL_OF_MEDIUM


@torch.inference_mode()
def test_generation_goes_on_from_decoded_kv(coded: Coded, cluster: ServedCluster, tmp_path: Path) -> None:
    """What another worker has stored is decoded, turned by each layer's own RoPE, and continued."""
    model, prompt = coded.observed.model, text(600, seed=4)[None]
    calibration = coded.klt.calibration
    with connect(cluster.address, encoding=MEDIUM.name, cache_dir=tmp_path) as client:
        client.calibrations.publish(calibration.to_bytes(), calibration.model_digest)
        cached = CachedModel(model, client)
        assert client.prepare(cached.spec).result(20) is not None
        plain = cached.generate(prompt, **STEPS)
        assert cached.last_report.reused_tokens == 0
        client.store.flush()
        buffers = client.buffers.acquire(cached.spec, 512)
        rotary = rotary_tables(model, 512, cached.spec.dtype.torch, "cpu")
        match = client.match(cached.spec, client.chunk_ids(cached.spec, prompt[0].tolist()))
        features = PromptFeatures(partial(embedded, model), prompt[0])
        assert client.fetch(match, buffers, rotary, features=features).wait().fetched == 2
        cached.close()
    question = text(CONTINUED, seed=5)[None]
    in_memory = [(layer.keys[0], layer.values[0]) for layer in plain.past_key_values.layers]
    fetched = list(zip(buffers.keys, buffers.values, strict=True))
    exact, decoded, mixed = (
        behind(model, kv, question) for kv in (in_memory, fetched, [fetched[index] for index in SWAPPED])
    )
    assert 1e-5 < divergence(exact, decoded) < 2 * KL_OF_MEDIUM
    assert divergence(exact, mixed) > 4 * KL_OF_MEDIUM


@pytest.mark.parametrize("family", KINDS)
def test_exact_reuse_says_what_the_model_says_without(cluster: ServedCluster, family: str) -> None:
    """Neither its own cache nor ours has what lies before the windows, and the answer is the same."""
    model, prompt = sharp(family), text(600, seed=6)[None]
    plain = model.generate(prompt, **STEPS)
    with connect(cluster.address) as client:
        cached = CachedModel(model, client)
        for reused_tokens in (0, 512):
            got = cached.generate(prompt, **STEPS)
            assert cached.last_report.reused_tokens == reused_tokens
            assert torch.equal(got.sequences, plain.sequences)
            for ours, expected in zip(got.logits, plain.logits, strict=True):
                torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
            client.store.flush()
        cached.close()


def behind(model: PreTrainedModel, layers: list[KV], continuation: torch.Tensor) -> torch.Tensor:
    """Log-probabilities at each token of `continuation` `[1, tokens]` behind the first 512 tokens of these layers."""
    cache = DynamicCache()
    for index, (keys, values) in enumerate(layers):
        cache.update(keys[None, :, :512], values[None, :, :512], index)
    logits: torch.Tensor = model(continuation, past_key_values=cache).logits[0]
    return logits.log_softmax(-1)


def divergence(exact: torch.Tensor, other: torch.Tensor) -> float:
    """Mean KL, nats a token, of log-probabilities `[tokens, vocabulary]`."""
    return float((exact.exp() * (exact - other)).sum(-1).mean())
