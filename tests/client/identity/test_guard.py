"""Changes are seen before a call reads, while its KV is on its way, and before it stores."""

import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from accelerate import dispatch_model
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module

from kvstore_client import KVStoreClient, connect
from kvstore_client.engines.transformers import CachedModel
from kvstore_client.engines.transformers.calibrate import ObservedModel
from kvstore_client.engines.transformers.identity.guard import ModelIdentity
from kvstore_codec.errors import UnsupportedModelError
from tests.client.conftest import ServedCluster
from tests.client.identity.foreign import louder, steer
from tests.client.models import random_prompt, tiny_model

GREEDY = {"do_sample": False, "max_new_tokens": 6}
PROMPT = random_prompt(600, seed=31)


@pytest.fixture
def client(cluster: ServedCluster) -> Iterator[KVStoreClient]:
    with connect(cluster.address) as client:
        yield client


class CallsBack:
    """A streamer that calls back with each token, and at the end."""

    def __init__(self, at_token: Callable[[], object], at_end: Callable[[], object] = lambda: None) -> None:
        self._at_token, self._at_end, self._tokens = at_token, at_end, 0

    def put(self, _value: object) -> None:
        self._tokens += 1
        if self._tokens == 3:
            self._at_token()

    def end(self) -> None:
        self._at_end()


def test_hooks_that_are_there_already_are_seen_until_they_are_gone(client: KVStoreClient) -> None:
    model = tiny_model()
    hook = model.model.layers[0].register_forward_hook(steer)
    cached = CachedModel(model, client)
    assert torch.equal(cached.generate(PROMPT, **GREEDY), model.generate(PROMPT, **GREEDY))
    assert cached.last_report.bypassed == "forward_hook"
    assert not cached.is_stored(PROMPT, **GREEDY)
    hook.remove()
    for reused in (0, 512):
        cached.generate(PROMPT, **GREEDY)
        client.store.flush()
        assert cached.last_report.bypassed is None
        assert cached.last_report.reused_tokens == reused


def test_the_reason_is_logged_once_with_the_place(
    client: KVStoreClient, caplog: pytest.LogCaptureFixture
) -> None:
    cached = CachedModel(tiny_model(), client)
    cached.model.model.layers[2].mlp.register_forward_hook(steer)
    for _ in range(3):
        cached.generate(PROMPT, **GREEDY)
    told = [r.getMessage() for r in caplog.records if "neither reused nor stored" in r.getMessage()]
    assert len(told) == 1
    assert "foreign.steer on layers.2.mlp" in told[0]
    assert client.metrics.snapshot()["miss_bypass_forward_hook"] == 3


@pytest.mark.parametrize("stored", [False, True])
def test_a_hook_between_the_halves_of_a_call(
    cluster: ServedCluster, client: KVStoreClient, stored: bool
) -> None:
    cached = CachedModel(tiny_model(), client)
    if stored:
        cached.generate(PROMPT, **GREEDY)
        client.store.flush()
    begun = cached.begin(PROMPT, **GREEDY)
    cached.model.model.layers[0].register_forward_hook(steer)
    assert torch.equal(cached.finish(begun), cached.model.generate(PROMPT, **GREEDY))
    assert cached.last_report.bypassed == "forward_hook"
    client.store.flush()
    assert cluster.stored_chunks() == (2 if stored else 0)
    cluster.check_nothing_is_held()


def test_what_a_model_computed_while_it_changed_is_not_stored(
    cluster: ServedCluster, client: KVStoreClient
) -> None:
    def hooked_for_a_while(model: torch.nn.Module) -> CallsBack:
        hooks = []
        return CallsBack(
            lambda: hooks.append(model.model.layers[0].register_forward_hook(steer)),
            lambda: hooks.pop().remove(),
        )

    def scaled(model: torch.nn.Module) -> CallsBack:
        return CallsBack(lambda: setattr(model.model.layers[0].self_attn, "scaling", 3.0))

    def written(model: torch.nn.Module) -> CallsBack:
        return CallsBack(lambda: model.model.layers[0].mlp.up_proj.weight.data.mul_(2))

    for count, change in enumerate((hooked_for_a_while, scaled, written), start=1):
        cached = CachedModel(tiny_model(), client)
        cached.generate(PROMPT, streamer=change(cached.model), **GREEDY)
        assert cached.last_report.bypassed is None
        client.store.flush()
        assert cluster.stored_chunks() == 0
        assert client.metrics.snapshot()["miss_store_model_changed"] == count
    cached = CachedModel(tiny_model(), client)
    cached.generate(PROMPT, streamer=CallsBack(lambda: None), **GREEDY)
    client.store.flush()
    assert cluster.stored_chunks() == 2


def test_accelerates_hooks_that_move_inputs_are_no_reason(client: KVStoreClient) -> None:
    model = tiny_model()
    cached = CachedModel(model, client)
    cached.generate(PROMPT, **GREEDY)
    client.store.flush()
    moved = dispatch_model(tiny_model(), {"": "cpu"}, main_device="cpu", force_hooks=True)
    assert any("forward" in vars(module) for module in moved.modules())
    other = CachedModel(moved, client)
    assert torch.equal(other.generate(PROMPT, **GREEDY), model.generate(PROMPT, **GREEDY))
    assert other.last_report.reused_tokens == 512

    class Scales(ModelHook):
        def post_forward(self, module: torch.nn.Module, output: torch.Tensor) -> torch.Tensor:
            return 2 * output

    add_hook_to_module(moved.model.layers[1].mlp, Scales(), append=True)
    assert torch.equal(other.generate(PROMPT, **GREEDY), moved.generate(PROMPT, **GREEDY))
    assert other.last_report.bypassed == "patched_module"


def test_a_forward_replaced_below_accelerates_hook_is_seen(client: KVStoreClient) -> None:
    model = tiny_model()
    mlp = model.model.layers[1].mlp
    mlp.forward = louder(mlp.forward)
    add_hook_to_module(mlp, AlignDevicesHook("cpu"))
    cached = CachedModel(model, client)
    cached.generate(PROMPT, **GREEDY)
    assert cached.last_report.bypassed == "patched_module"


def test_a_subclass_that_only_adds_is_the_model_it_was() -> None:
    model = tiny_model()
    plain = ModelIdentity(model).current()
    adds = type("Adds", (type(model),), {"count": lambda _self: 1})
    replaces = type("Replaces", (type(model),), {"forward": lambda _self, *_, **__: None})
    model.__class__ = adds
    assert ModelIdentity(model).current() == plain
    model.__class__ = replaces
    refusal = ModelIdentity(model).current().refusal
    assert refusal is not None
    assert refusal.reason == "patched_module"


def test_nothing_is_looked_at_closely_while_nothing_changes(
    client: KVStoreClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = CachedModel(tiny_model(), client)
    cached.generate(PROMPT, **GREEDY)
    looks: list[object] = []
    renew = ModelIdentity._renew
    monkeypatch.setattr(ModelIdentity, "_renew", lambda self: (looks.append(self), renew(self)))
    for _ in range(3):
        client.store.flush()
        cached.generate(PROMPT, **GREEDY)
    assert cached.last_report.reused_tokens == 512
    assert not looks


def test_a_changed_model_is_not_calibrated() -> None:
    model = tiny_model()
    model.model.layers[0].register_forward_hook(steer)
    with pytest.raises(UnsupportedModelError, match=r"steer on layers\.0"):
        ObservedModel(model)


def test_a_model_that_cannot_be_looked_at_is_left_alone_until_it_can(client: KVStoreClient) -> None:
    cached = CachedModel(tiny_model(), client)
    config, own = cached.model.config, cached.model.generate(PROMPT, **GREEDY)
    config.odd = {"means": np.arange(3)}
    for _ in range(2):
        assert torch.equal(cached.generate(PROMPT, **GREEDY), own)
        assert cached.last_report.bypassed == "model_changed"
    del config.odd
    cached.generate(PROMPT, **GREEDY)
    assert cached.last_report.bypassed is None
    config.odd = [threading.Lock()]
    for _ in range(2):
        refusal = cached._identity.current().refusal
        assert refusal is not None
        assert "lock" in refusal.detail
    with pytest.raises(UnsupportedModelError, match="lock"):
        CachedModel(cached.model, client)


def test_a_setting_that_is_a_list_is_looked_into() -> None:
    model = tiny_model("gemma3")
    identity = ModelIdentity(model)
    kinds = model.model.rotary_emb.layer_types
    kinds.append("another")
    refusal = identity.current().refusal
    assert refusal is not None
    assert refusal.reason == "changed_setting"
    kinds.pop()
    assert identity.current().refusal is None


def test_weights_that_are_tied_to_another_layers_are_named_apart() -> None:
    model = tiny_model()
    projections = [layer.mlp.up_proj for layer in model.model.layers]
    projections[2].weight = projections[0].weight
    identity = ModelIdentity(model)
    tied_to_first = identity.current().spec.digest
    projections[2].weight = projections[1].weight
    assert identity.current().spec.digest == ModelIdentity(model).spec.digest != tied_to_first
    projections[2].weight = projections[0].weight
    assert identity.current().spec.digest == tied_to_first


def rows_by_data(weight: torch.Tensor) -> None:
    weight.data[5:7] *= 30


def rows_by_numpy(weight: torch.Tensor) -> None:
    weight.detach().numpy()[5:7] *= 30


@pytest.mark.parametrize("write", [rows_by_data, rows_by_numpy])
def test_what_rows_written_past_autograd_compute_has_another_name_or_is_not_stored(
    client: KVStoreClient, write: Callable[[torch.Tensor], None]
) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 16}
    cached, plain = (CachedModel(tiny_model(**sizes), client) for _ in range(2))
    cached.generate(random_prompt(100, seed=32), **GREEDY)
    write(cached.model.model.layers[3].self_attn.o_proj.weight)
    for _ in range(2):
        cached.generate(PROMPT, **GREEDY)
        client.store.flush()
    assert cached.spec.digest == ModelIdentity(cached.model).spec.digest != plain.spec.digest
    assert torch.equal(plain.generate(PROMPT, **GREEDY), plain.model.generate(PROMPT, **GREEDY))
    assert plain.last_report.reused_tokens == 0


def test_rows_written_past_autograd_are_seen_in_time() -> None:
    model = tiny_model(hidden_size=256, intermediate_size=512)
    identity = ModelIdentity(model)
    name = identity.spec.digest
    for row in range(0, 512, 73):
        model.model.layers[row % 5].mlp.up_proj.weight.data[row] *= 2
        looks = sum(identity.current().spec.digest == name for _ in range(10))
        assert looks < 10
        name = identity.spec.digest


def test_embeddings_written_past_autograd_are_seen_when_a_prompt_has_them() -> None:
    model = tiny_model(hidden_size=256)
    embeddings = model.get_input_embeddings().weight
    for token in (0, 17, 255, 511):
        identity = ModelIdentity(model)
        name = identity.spec.digest
        embeddings.data[token] = embeddings.data.mean(0)
        assert identity.current(torch.tensor([[3, token, 9]])).spec.digest != name


def test_a_close_look_sees_every_row() -> None:
    model = tiny_model(hidden_size=256, intermediate_size=512)
    identity = ModelIdentity(model)
    for layer in model.model.layers:
        name = identity.spec.digest
        layer.mlp.up_proj.weight.data[100] *= 2
        assert identity.current(every_row=True).spec.digest != name
