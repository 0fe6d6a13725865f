"""Models whose weights cannot be named are refused with a sentence, whatever is odd about them."""

import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from torch import nn
from torch._subclasses import FakeTensorMode
from transformers import GPT2Config, GPT2LMHeadModel, LlamaModel

from kvstore_client import KVStoreClient, connect
from kvstore_client.engines.transformers import CachedModel
from kvstore_codec.errors import UnsupportedModelError
from tests.client.conftest import ServedCluster
from tests.client.models import random_prompt, tiny_model


@pytest.fixture
def client(cluster: ServedCluster) -> Iterator[KVStoreClient]:
    with connect(cluster.address) as client:
        yield client


def quantised(_folder: Path) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(tiny_model(), {nn.Linear}, dtype=torch.qint8)


def on_meta(_folder: Path) -> nn.Module:
    return tiny_model().to("meta")


def offloaded(_folder: Path) -> nn.Module:
    return cpu_offload(tiny_model())


def on_disk(folder: Path) -> nn.Module:
    return disk_offload(tiny_model(), str(folder))


def sparse(_folder: Path) -> nn.Module:
    model = tiny_model()
    projection = model.model.layers[0].mlp.up_proj
    projection.weight = nn.Parameter(projection.weight.detach().to_sparse(), requires_grad=False)
    return model


def fake(_folder: Path) -> nn.Module:
    model = tiny_model()
    projection = model.model.layers[0].mlp.up_proj
    projection.weight = nn.Parameter(FakeTensorMode().from_tensor(projection.weight.detach()))
    return model


def double(_folder: Path) -> nn.Module:
    return tiny_model().double()


def mixed(_folder: Path) -> nn.Module:
    model = tiny_model()
    model.model.layers[1].self_attn.k_proj.to(torch.bfloat16)
    return model


def without_attention(_folder: Path) -> nn.Module:
    model = tiny_model()
    del model.model.layers[0].self_attn
    return model


def without_rotation(_folder: Path) -> nn.Module:
    model = tiny_model()
    del model.model.rotary_emb
    return model


def frequencies_on_meta(_folder: Path) -> nn.Module:
    model = tiny_model()
    model.model.rotary_emb.to("meta")
    return model


def with_odd_rope(_folder: Path) -> nn.Module:
    model = tiny_model()
    model.config.rope_parameters = {"rope_type": "linear", "rope_theta": 1e4}
    return model


def other_family(_folder: Path) -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2))


def without_head(_folder: Path) -> nn.Module:
    return LlamaModel(tiny_model().config)


def no_model(_folder: Path) -> nn.Module:
    return nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (quantised, "quantisation"),
        (on_meta, "meta device"),
        (offloaded, "offload"),
        (on_disk, "offload"),
        (sparse, "sparse"),
        (fake, "FakeTensor"),
        (double, "float64"),
        (mixed, "different types"),
        (without_attention, "attention modules"),
        (without_rotation, "rotary"),
        (frequencies_on_meta, "meta device"),
        (with_odd_rope, "factor"),
        (other_family, "family 'gpt2'"),
        (without_head, "LlamaModel"),
        (no_model, "generate"),
    ],
)
def test_an_odd_model_is_refused_with_a_sentence(
    client: KVStoreClient, tmp_path: Path, make: Callable[[Path], nn.Module], said: str
) -> None:
    model = make(tmp_path / "offloaded")
    hooks = [len(module._forward_hooks) for module in model.modules()]
    with pytest.raises(UnsupportedModelError, match=said):
        CachedModel(model, client)
    assert [len(module._forward_hooks) for module in model.modules()] == hooks


def test_tied_weights_and_frozen_ones_are_ordinary(client: KVStoreClient) -> None:
    model = tiny_model(tie_word_embeddings=True).requires_grad_(requires_grad=False)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    cached = CachedModel(model, client)
    assert cached.spec == CachedModel(copy.deepcopy(model), client).spec
    cached.generate(random_prompt(300), do_sample=False, max_new_tokens=2)
    assert cached.last_report.bypassed is None


def test_weights_that_lose_their_bytes_later_are_passed_through(client: KVStoreClient) -> None:
    model, prompt = tiny_model(), random_prompt(300)
    cached = CachedModel(model, client)
    cpu_offload(model)
    for _ in range(2):
        own = model.generate(prompt, do_sample=False, max_new_tokens=2)
        assert torch.equal(cached.generate(prompt, do_sample=False, max_new_tokens=2), own)
        assert cached.last_report.bypassed == "model_changed"
