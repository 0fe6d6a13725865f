"""Compiled workers and plain ones share names, and what each stores the other reads."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

from kvstore_client import KVStoreClient, connect
from kvstore_client.engines.transformers import CachedModel
from kvstore_client.engines.transformers.identity.guard import ModelIdentity
from tests.client.conftest import ServedCluster
from tests.client.models import random_prompt, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

GREEDY = {"do_sample": False, "max_new_tokens": 3}
PROMPT = random_prompt(300, seed=51)
BACKEND = "eager"


@pytest.fixture
def client(cluster: ServedCluster) -> Iterator[KVStoreClient]:
    torch._dynamo.reset()
    with connect(cluster.address) as client:
        yield client
    torch._dynamo.reset()


def whole(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend=BACKEND)


def in_place(model: nn.Module) -> nn.Module:
    model.compile(backend=BACKEND)
    return model


def its_forward(model: nn.Module) -> nn.Module:
    model.forward = torch.compile(model.forward, backend=BACKEND)
    return model


def each_layer(model: nn.Module) -> nn.Module:
    for index, layer in enumerate(model.model.layers):
        model.model.layers[index] = torch.compile(layer, backend=BACKEND)
    return model


def its_decoder(model: nn.Module) -> nn.Module:
    model.model = torch.compile(model.model, backend=BACKEND)
    return model


def each_attention(model: nn.Module) -> nn.Module:
    for layer in model.model.layers:
        layer.self_attn = torch.compile(layer.self_attn, backend=BACKEND)
    return model


WAYS = (whole, in_place, its_forward, each_layer, its_decoder, each_attention)


@pytest.mark.parametrize("compiled", WAYS)
def test_a_compiled_model_has_the_name_of_the_plain_one(compiled: Callable[[nn.Module], nn.Module]) -> None:
    plain = ModelIdentity(tiny_model()).current()
    assert plain.refusal is None
    model = compiled(tiny_model())
    assert ModelIdentity(getattr(model, "_orig_mod", model)).current() == plain


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [whole, its_forward, each_layer, each_attention])
@pytest.mark.filterwarnings("ignore")  # torch's own, while it compiles
def test_compiled_and_plain_workers_read_what_the_other_stores(
    cluster: ServedCluster, client: KVStoreClient, compiled: Callable[[nn.Module], nn.Module]
) -> None:
    sizes = {"num_hidden_layers": 2}
    own = tiny_model(**sizes).generate(PROMPT, **GREEDY)
    cached = CachedModel(compiled(tiny_model(**sizes)), client)
    for _ in range(3):  # a call in which torch still compiles may store nothing
        assert torch.equal(cached.generate(PROMPT, **GREEDY), own)
        assert cached.last_report.bypassed is None
        client.store.flush()
    assert cluster.stored_chunks() == 1
    for worker in (CachedModel(tiny_model(**sizes), client), cached):
        assert torch.equal(worker.generate(PROMPT, **GREEDY), own)
        assert worker.last_report.reused_tokens == 256
