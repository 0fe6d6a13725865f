"""A name covers what computes: weights, and what is in effect besides them."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from kvstore_client import KVStoreClient, connect
from kvstore_client.engines.transformers import CachedModel
from kvstore_client.engines.transformers.rotary import rotary_tables
from kvstore_client.engines.transformers.spec import describe, spec_of
from tests.client.conftest import ServedCluster
from tests.client.models import FAMILIES, random_prompt, tiny_model

GREEDY = {"do_sample": False, "max_new_tokens": 6}


@pytest.fixture
def client(cluster: ServedCluster) -> Iterator[KVStoreClient]:
    with connect(cluster.address) as client:
        yield client


def loaded(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_as_it_is_loaded_has_the_name_that_its_config_and_weights_give(
    family: str, tmp_path: Path
) -> None:
    tiny_model(family).save_pretrained(tmp_path)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        found = describe(loaded(tmp_path, dtype))
        assert found.refusal is None
        assert all(name in found.reference.config for name, _ in found.spec.numerics)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_weights_cast_after_loading_are_named_apart(family: str, tmp_path: Path) -> None:
    """The cast rounds the rotary frequencies too, which no checkpoint holds."""
    tiny_model(family).save_pretrained(tmp_path)
    as_loaded, cast = loaded(tmp_path, torch.bfloat16), loaded(tmp_path, torch.float32).to(torch.bfloat16)
    assert all(map(torch.equal, as_loaded.state_dict().values(), cast.state_dict().values()))
    one, other = spec_of(as_loaded), spec_of(cast)
    assert one.weights_digest == other.weights_digest
    assert one.digest != other.digest
    new = {name for name, _ in other.numerics} - {name for name, _ in one.numerics}
    assert new
    assert all("inv_freq" in name for name in new)


def test_what_differs_from_the_config_is_named_with_its_value() -> None:
    model = tiny_model()
    plain = spec_of(model)
    model.model.layers[1].input_layernorm.variance_epsilon = 0.25
    changed = spec_of(model)
    assert set(changed.numerics) - set(plain.numerics) == {
        ("layers.1.input_layernorm.variance_epsilon", 0.25)
    }
    model.model.layers[1].input_layernorm.variance_epsilon = 1e-6
    assert spec_of(model) == plain


def test_keys_are_rotated_by_the_tables_of_the_model_that_reads(client: KVStoreClient) -> None:
    """Writer and reader turn by the same frequencies, which are not those of their config."""

    def turned() -> PreTrainedModel:
        model = tiny_model()
        model.model.rotary_emb.inv_freq.mul_(1.7)
        return model

    prompt = random_prompt(600)
    CachedModel(turned(), client).generate(prompt, **GREEDY)
    client.store.flush()
    reader = turned()
    cached = CachedModel(reader, client)
    got = cached.generate(prompt, return_dict_in_generate=True, **GREEDY)
    assert cached.last_report.reused_tokens == 512
    own = reader.generate(prompt, return_dict_in_generate=True, **GREEDY)
    assert torch.equal(got.sequences, own.sequences)
    for ours, theirs in zip(got.past_key_values.layers, own.past_key_values.layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys, rtol=1e-4, atol=1e-5)
    table = rotary_tables(reader, 8, torch.float32, "cpu")[0]
    assert not torch.equal(table.cos, rotary_tables(tiny_model(), 8, torch.float32, "cpu")[0].cos)


def test_describing_a_model_draws_no_random_numbers() -> None:
    model = tiny_model()
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    spec_of(model)
    assert torch.equal(torch.rand(4), expected)


def test_precisions_of_products_have_the_names_that_torch_gives_them() -> None:
    plain = spec_of(tiny_model())
    backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before = [backend.fp32_precision for backend in backends]
    named = {
        ("tf32", "tf32"): "high",
        ("tf32", "bf16"): "medium",
        ("ieee", "none"): None,
        ("tf32", "none"): "cuda=tf32 mkldnn=ieee",
        ("ieee", "bf16"): "cuda=ieee mkldnn=bf16",
    }
    try:
        for settings, word in named.items():
            for backend, setting in zip(backends, settings, strict=True):
                backend.fp32_precision = setting
            spec = spec_of(tiny_model())
            assert dict(spec.numerics).get("float32_matmul_precision") == word
            assert (spec.digest == plain.digest) == (word is None)
    finally:
        for backend, setting in zip(backends, before, strict=True):
            backend.fp32_precision = setting
