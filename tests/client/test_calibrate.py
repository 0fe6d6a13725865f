"""What calibration sees of a model is what the model computes."""

import pytest
import torch
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from kvstore_client.engines.transformers.calibrate import ObservedModel
from kvstore_client.engines.transformers.rotary import rotary_tables
from kvstore_codec.model_spec import KVDtype
from tests.client.models import FAMILIES, random_prompt, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS, CONTINUED = 40, 12


@pytest.fixture(params=FAMILIES)
def observed(request: pytest.FixtureRequest) -> ObservedModel:
    return ObservedModel(tiny_model(request.param))


def test_keys_and_values_give_the_models_own_logits(observed: ObservedModel) -> None:
    ids = random_prompt(TOKENS + CONTINUED)[0]
    text = observed.prefill(ids[:TOKENS])
    with torch.no_grad():
        whole = observed.model(ids[None]).logits[0, TOKENS:].log_softmax(-1)
    ours = observed.log_probabilities(text.keys, text.values, ids[TOKENS:])
    torch.testing.assert_close(ours, whole, rtol=1e-4, atol=1e-5)


def test_queries_and_keys_make_the_models_attention(observed: ObservedModel) -> None:
    observed.model.set_attn_implementation("eager")
    ids = random_prompt(TOKENS)[0]
    text = observed.prefill(ids)
    heads = text.queries.shape[1] // observed.spec.kv_heads
    with torch.no_grad():
        attention = observed.model(ids[None], output_attentions=True).attentions
    tables = rotary_tables(observed.model, TOKENS, torch.float32, "cpu")
    for layer, (table, expected) in enumerate(zip(tables, attention, strict=True)):
        queries, keys = apply_rotary_pos_emb(
            text.queries[None, layer],
            text.keys[None, layer].repeat_interleave(heads, 1),
            table.cos[None],
            table.sin[None],
        )
        scores = queries[0, :, -1:] @ keys[0].transpose(1, 2) * observed.spec.head_dim**-0.5
        torch.testing.assert_close(scores.softmax(-1), expected[0, :, -1:], rtol=1e-4, atol=1e-5)


def test_the_output_weight_is_the_error_that_values_make(observed: ObservedModel) -> None:
    """An error in one KV head's values, attended to by all its query heads alike."""
    heads, dim = observed.spec.kv_heads, observed.spec.head_dim
    error = torch.randn(dim, generator=torch.Generator().manual_seed(1))
    group = observed.model.config.num_attention_heads // heads
    weight = observed.model.get_decoder().layers[2].self_attn.o_proj.weight.detach()
    expected = 0.0
    for query_head in range((heads - 1) * group, heads * group):
        attended = torch.zeros(heads * group, dim)
        attended[query_head] = error
        expected += float((weight @ attended.flatten()).square().sum())
    assert float(error @ observed.output_weight()[2, heads - 1] @ error) == pytest.approx(expected, rel=1e-4)


def test_fisher_scalars_are_repeatable_and_those_of_the_gradient(observed: ObservedModel) -> None:
    ids = random_prompt(TOKENS + CONTINUED)[0]
    text = observed.prefill(ids[:TOKENS])
    first, again = (
        observed.fisher(text, ids[TOKENS:], torch.Generator().manual_seed(7), sinks=4) for _ in range(2)
    )
    assert first.shape == (5, 2)
    assert bool((first > 0).all())
    assert torch.equal(first, again)

    # A small random error in one layer's values changes the log-likelihood as far as the scalar says.
    drawn = torch.multinomial(
        observed.log_probabilities(text.keys, text.values, ids[TOKENS:]).exp(),
        1,
        generator=torch.Generator().manual_seed(7),
    )
    generator = torch.Generator().manual_seed(8)
    changes = []
    for _ in range(64):
        noise = torch.zeros_like(text.values)
        shape = noise[3, :, 4:].shape
        noise[3, :, 4:] = 1e-2 * (torch.randint(0, 2, shape, generator=generator) * 2 - 1)
        up, down = (
            observed.log_probabilities(text.keys, text.values + sign * noise, ids[TOKENS:])
            .gather(1, drawn)
            .sum()
            for sign in (1, -1)
        )
        changes.append(float((up - down) / 2e-2) ** 2)
    directional = sum(changes) / len(changes) / noise[3, :, 4:].numel()
    assert directional == pytest.approx(float(first[3, 1]), rel=0.6)


def test_a_half_precision_model_is_described_as_it_came() -> None:
    observed = ObservedModel(tiny_model(dtype=torch.bfloat16))
    assert observed.spec.dtype is KVDtype.BFLOAT16
    text = observed.prefill(random_prompt(9)[0])
    assert text.keys.dtype == torch.float32
    assert text.features.shape == (9, 128)


def test_watching_leaves_no_hooks(observed: ObservedModel) -> None:
    observed.prefill(random_prompt(9)[0])
    assert not any(module._forward_hooks for module in observed.model.modules())


def test_cached_keys_are_the_seen_ones_rotated(observed: ObservedModel) -> None:
    ids = random_prompt(TOKENS)[0]
    text = observed.prefill(ids)
    cache = DynamicCache()
    with torch.no_grad():
        observed.model(ids[None], past_key_values=cache, use_cache=True)
    for layer in range(5):
        # RoPE turns pairs of channels: lengths stay (up to the scaling that yarn-like kinds add, none here).
        torch.testing.assert_close(
            cache.layers[layer].keys[0].square().sum(-1), text.keys[layer].square().sum(-1)
        )
