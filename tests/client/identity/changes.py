"""Kinds of change that a model can go through after it was wrapped."""

import functools
import random
import threading
import warnings
from collections.abc import Callable
from types import MethodType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrize, prune
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import tests.client.identity.foreign as foreign

Undo = Callable[[], object]


class Change(NamedTuple):
    """`apply` may return what takes it off again: then it concerns the whole process, not this model alone."""

    apply: Callable[[PreTrainedModel, random.Random], Undo | None]
    outcome: str
    """`apart`: it has another name. `same`: KV does not depend on it. Else why the call is passed through."""
    families: tuple[str, ...] = ("llama", "qwen2", "qwen3", "gemma3")


CHANGES: dict[str, Change] = {}


def change(outcome: str, *families: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def add(apply: Callable[..., Any]) -> Callable[..., Any]:
        CHANGES[apply.__name__] = Change(apply, outcome, families or Change._field_defaults["families"])
        return apply

    return add


def layer(model: PreTrainedModel, draw: random.Random) -> Any:
    return draw.choice(list(model.model.layers))


def norm(model: PreTrainedModel, draw: random.Random) -> Any:
    owner = layer(model, draw)
    return draw.choice([owner.input_layernorm, owner.post_attention_layernorm])


def frequencies(model: PreTrainedModel, draw: random.Random) -> str:
    names = model.model.rotary_emb._non_persistent_buffers_set
    return draw.choice(sorted(name for name in names if "original" not in name))


def replaced(owner: Any, name: str, value: object) -> Undo:
    before = getattr(owner, name)
    setattr(owner, name, value)
    return lambda: setattr(owner, name, before)


# Scalars


@change("apart", "llama", "qwen2", "qwen3")
def another_epsilon(model: PreTrainedModel, draw: random.Random) -> None:
    norm(model, draw).variance_epsilon = draw.uniform(0.3, 2)


@change("apart", "gemma3")
def another_epsilon_of_gemma(model: PreTrainedModel, draw: random.Random) -> None:
    norm(model, draw).eps = draw.uniform(0.3, 2)


@change("apart")
def another_scaling(model: PreTrainedModel, draw: random.Random) -> None:
    layer(model, draw).self_attn.scaling *= draw.uniform(2, 5)


@change("changed_setting")
def a_scaling_that_is_a_tensor(model: PreTrainedModel, draw: random.Random) -> None:
    attention = layer(model, draw).self_attn
    attention.scaling = torch.tensor(attention.scaling * 3)


@change("apart", "llama", "qwen2", "qwen3")
def another_attention_scaling(model: PreTrainedModel, draw: random.Random) -> None:
    model.model.rotary_emb.attention_scaling = draw.uniform(1.5, 3)


@change("apart", "gemma3")
def another_attention_scaling_of_gemma(model: PreTrainedModel, draw: random.Random) -> None:
    model.model.rotary_emb.full_attention_attention_scaling = draw.uniform(1.5, 3)


@change("changed_setting", "gemma3", "qwen2")
def another_window_of_one_layer(model: PreTrainedModel, draw: random.Random) -> None:
    layer(model, draw).self_attn.sliding_window = 17


@change("changed_setting", "llama", "qwen3")
def tokens_that_see_later_ones(model: PreTrainedModel, draw: random.Random) -> None:
    model.config.is_causal = False


@change("changed_setting")
def a_layer_in_training(model: PreTrainedModel, draw: random.Random) -> None:
    attention = layer(model, draw).self_attn
    attention.train()


@change("model_changed")
def fewer_layers(model: PreTrainedModel, draw: random.Random) -> None:
    model.config.num_hidden_layers -= 1
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[:-1]


@change("apart", "gemma3")
def another_window_in_the_config(model: PreTrainedModel, draw: random.Random) -> None:
    model.config.sliding_window = 40
    for owner in model.model.layers:
        if owner.self_attn.sliding_window:
            owner.self_attn.sliding_window = 40


@change("same")
def a_config_for_padding(model: PreTrainedModel, draw: random.Random) -> None:
    model.config.pad_token_id = 7


@change("same")
def another_attention_kernel(model: PreTrainedModel, draw: random.Random) -> None:
    model.set_attn_implementation("eager")


@change("apart")
def another_precision_of_products(model: PreTrainedModel, draw: random.Random) -> Undo:
    torch.set_float32_matmul_precision("medium")
    return lambda: torch.set_float32_matmul_precision("highest")


def precision_of(backend: Any, value: str) -> Undo:
    """Set the precision of one backend's products, or of all backends' with `torch.backends`."""
    backends = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]
    undo = [replaced(each, "fp32_precision", "none") for each in backends]
    undo.append(replaced(backend, "fp32_precision", value))
    return lambda: [take_off() for take_off in reversed(undo)]


@change("apart")
def another_precision_on_gpus(model: PreTrainedModel, draw: random.Random) -> Undo:
    return precision_of(torch.backends.cuda.matmul, "tf32")


@change("apart")
def another_precision_on_processors(model: PreTrainedModel, draw: random.Random) -> Undo:
    return precision_of(torch.backends.mkldnn.matmul, "bf16")


@change("apart")
def another_precision_everywhere(model: PreTrainedModel, draw: random.Random) -> Undo:
    return precision_of(torch.backends, "tf32")


# What users keep on a model


@change("same")
def arrays_of_statistics(model: PreTrainedModel, draw: random.Random) -> None:
    model.statistics = {"means": np.arange(3)}


@change("same")
def a_lock_in_a_list(model: PreTrainedModel, draw: random.Random) -> None:
    layer(model, draw).extra = [threading.Lock()]
    model.extra = [threading.Lock()]


@change("same")
def a_counter_of_calls(model: PreTrainedModel, draw: random.Random) -> None:
    model.calls, model.counts = 0, {"calls": 0}

    def count(*_: object) -> None:
        model.calls += 1
        model.counts["calls"] += 1

    model.lm_head.register_forward_hook(count)


@change("same")
def captured_activations(model: PreTrainedModel, draw: random.Random) -> None:
    model.saved = []
    model.lm_head.register_forward_hook(lambda _module, inputs, _output: model.saved.append(inputs[0]))
    model(torch.tensor([[1, 2, 3]]))  # these ask for gradients


@change("same")
def tensors_in_a_list(model: PreTrainedModel, draw: random.Random) -> None:
    model.saved = [torch.ones(3), torch.ones(4)]


@change("model_changed")
def arrays_in_the_config(model: PreTrainedModel, draw: random.Random) -> None:
    model.config.extra = {"means": np.arange(3)}


# Buffers


@change("apart")
def scaled_frequencies(model: PreTrainedModel, draw: random.Random) -> None:
    getattr(model.model.rotary_emb, frequencies(model, draw)).mul_(draw.uniform(1.3, 3))


@change("apart")
def one_frequency_written_past_autograd(model: PreTrainedModel, draw: random.Random) -> None:
    getattr(model.model.rotary_emb, frequencies(model, draw)).data[1] *= 3


@change("apart")
def replaced_frequencies(model: PreTrainedModel, draw: random.Random) -> None:
    name = frequencies(model, draw)
    setattr(model.model.rotary_emb, name, getattr(model.model.rotary_emb, name) * draw.uniform(1.3, 3))


@change("apart", "gemma3")
def another_embedding_scale(model: PreTrainedModel, draw: random.Random) -> None:
    model.model.embed_tokens.embed_scale.fill_(draw.uniform(2, 5))


@change("apart", "llama", "qwen2", "qwen3")
def scaled_rope(model: PreTrainedModel, draw: random.Random) -> None:
    model.config.rope_parameters = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)


@change("model_changed", "llama", "qwen2", "qwen3")
def rope_that_depends_on_the_length(model: PreTrainedModel, draw: random.Random) -> None:
    model.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)


@change("changed_setting", "llama", "qwen2", "qwen3")
def rope_of_another_type_than_the_config(model: PreTrainedModel, draw: random.Random) -> None:
    model.model.rotary_emb.rope_type = "linear"


# Types


@change("apart")
def cast_to_bfloat16(model: PreTrainedModel, draw: random.Random) -> None:
    model.to(torch.bfloat16)


@change("apart")
def cast_there_and_back(model: PreTrainedModel, draw: random.Random) -> None:
    model.to(torch.bfloat16).to(torch.float32)


@change("apart")
def frequencies_cast_there_and_back(model: PreTrainedModel, draw: random.Random) -> None:
    model.model.rotary_emb.to(torch.bfloat16).to(torch.float32)


@change("apart")
def a_norm_in_bfloat16(model: PreTrainedModel, draw: random.Random) -> None:
    norm(model, draw).to(torch.bfloat16)


# Modules


@change("patched_module")
def another_activation(model: PreTrainedModel, draw: random.Random) -> None:
    layer(model, draw).mlp.act_fn = nn.Tanh()


@change("patched_module")
def a_module_of_somebody_else(model: PreTrainedModel, draw: random.Random) -> None:
    owner = layer(model, draw)
    owner.mlp = foreign.Louder(owner.mlp)


@change("patched_module")
def another_class_of_a_module(model: PreTrainedModel, draw: random.Random) -> None:
    mlp = layer(model, draw).mlp
    mlp.__class__ = foreign.louder_class(type(mlp))


@change("patched_module")
def another_class_of_an_activation(model: PreTrainedModel, draw: random.Random) -> None:
    layer(model, draw).mlp.act_fn.__class__ = nn.Tanh


@change("patched_module")
def a_lora_layer(model: PreTrainedModel, draw: random.Random) -> None:
    owner = layer(model, draw).self_attn
    owner.v_proj = foreign.LoraLinear(owner.v_proj)


@change("changed_setting", "llama", "qwen3")
def two_layers_in_another_order(model: PreTrainedModel, draw: random.Random) -> None:
    layers = model.model.layers
    layers[0], layers[2] = layers[2], layers[0]


@change("apart")
def another_mlp(model: PreTrainedModel, draw: random.Random) -> None:
    owner = layer(model, draw)
    owner.mlp = type(owner.mlp)(model.config).eval()


@change("apart")
def another_key_projection(model: PreTrainedModel, draw: random.Random) -> None:
    owner = layer(model, draw).self_attn
    old = owner.k_proj
    owner.k_proj = nn.Linear(old.in_features, old.out_features, bias=old.bias is not None)


@change("apart")
def another_decoder(model: PreTrainedModel, draw: random.Random) -> None:
    model.model = type(model.model)(model.config).eval()


@change("apart")
def another_head(model: PreTrainedModel, draw: random.Random) -> None:
    model.lm_head = nn.Linear(64, 512, bias=False)


@change("patched_module")
def a_replaced_forward(model: PreTrainedModel, draw: random.Random) -> None:
    mlp = layer(model, draw).mlp
    mlp.forward = foreign.louder(mlp.forward)


@change("patched_module")
def a_replaced_method(model: PreTrainedModel, draw: random.Random) -> None:
    attention = layer(model, draw).self_attn
    attention.forward = MethodType(foreign.reversed_attention(type(attention).forward), attention)


@change("patched_module")
def a_patched_class(model: PreTrainedModel, draw: random.Random) -> Undo:
    owner = type(layer(model, draw).mlp)
    return replaced(owner, "forward", foreign.louder(owner.forward))


@change("patched_module")
def a_patched_class_of_torch(model: PreTrainedModel, draw: random.Random) -> Undo:
    return replaced(nn.Linear, "forward", foreign.louder(nn.Linear.forward))


@change("patched_module")
def a_patched_rotation(model: PreTrainedModel, draw: random.Random) -> Undo:
    file = __import__(type(model).__module__, fromlist=["apply_rotary_pos_emb"])
    return replaced(file, "apply_rotary_pos_emb", foreign.without_rotation)


@change("patched_module")
def a_patched_attention(model: PreTrainedModel, draw: random.Random) -> Undo:
    return replaced(
        nn.functional,
        "scaled_dot_product_attention",
        foreign.louder(nn.functional.scaled_dot_product_attention),
    )


@change("patched_module")
def a_patched_cache(model: PreTrainedModel, draw: random.Random) -> Undo:
    return replaced(DynamicLayer, "update", foreign.rounded_values(DynamicLayer.update))


@change("patched_module", "llama", "qwen2", "qwen3")
def a_patched_function_of_torch(model: PreTrainedModel, draw: random.Random) -> Undo:
    return replaced(torch, "rsqrt", foreign.louder(torch.rsqrt))


@change("patched_module")
def a_patched_method_of_tensors(model: PreTrainedModel, draw: random.Random) -> Undo:
    torch.Tensor.contiguous = foreign.louder(torch.Tensor.contiguous)
    return lambda: delattr(torch.Tensor, "contiguous")  # tensors inherit their own


@change("patched_module")
def replaced_code(model: PreTrainedModel, draw: random.Random) -> Undo:
    file = __import__(type(model).__module__, fromlist=["rotate_half"])
    return replaced(file.rotate_half, "__code__", foreign.halved.__code__)


@change("patched_module")
def a_registered_attention(model: PreTrainedModel, draw: random.Random) -> None:
    ALL_ATTENTION_FUNCTIONS.register("kvstore-test", foreign.attention)
    model.set_attn_implementation("kvstore-test")


@change("patched_module")
def a_parametrized_weight(model: PreTrainedModel, draw: random.Random) -> None:
    parametrize.register_parametrization(layer(model, draw).mlp.up_proj, "weight", foreign.Doubled())


# Hooks


@change("forward_hook")
def a_hook_that_steers(model: PreTrainedModel, draw: random.Random) -> None:
    layer(model, draw).mlp.register_forward_hook(foreign.steer)


@change("forward_hook")
def a_hook_on_a_layer(model: PreTrainedModel, draw: random.Random) -> None:
    layer(model, draw).register_forward_hook(functools.partial(foreign.steer))


@change("forward_hook")
def a_hook_on_inputs(model: PreTrainedModel, draw: random.Random) -> None:
    norm(model, draw).register_forward_pre_hook(lambda _module, inputs: (inputs[0] * 0.5 + 1,))


@change("forward_hook")
def a_hook_on_embeddings(model: PreTrainedModel, draw: random.Random) -> None:
    model.get_input_embeddings().register_forward_hook(foreign.steer)


@change("forward_hook")
def a_hook_on_the_arguments(model: PreTrainedModel, draw: random.Random) -> None:
    model.register_forward_pre_hook(foreign.other_tokens, with_kwargs=True)


@change("global_hook")
def a_hook_on_all_modules(model: PreTrainedModel, draw: random.Random) -> Undo:
    kind = type(layer(model, draw).mlp)
    hook = nn.modules.module.register_module_forward_hook(
        lambda module, _inputs, output: output + 0.5 if isinstance(module, kind) else None
    )
    return hook.remove


@change("forward_hook")
def a_pruned_weight(model: PreTrainedModel, draw: random.Random) -> None:
    prune.random_unstructured(layer(model, draw).mlp.down_proj, "weight", amount=0.5)


@change("same")
def a_hook_on_the_head(model: PreTrainedModel, draw: random.Random) -> None:
    model.lm_head.register_forward_hook(lambda _module, _inputs, output: output.flip(-1))


@change("same")
def hooks_that_transformers_leaves_behind(model: PreTrainedModel, draw: random.Random) -> None:
    model(torch.tensor([[1, 2, 3]]), output_hidden_states=True)


@change("same")
def inputs_that_require_gradients(model: PreTrainedModel, draw: random.Random) -> None:
    model.enable_input_require_grads()


@change("same")
def checkpoints_of_gradients(model: PreTrainedModel, draw: random.Random) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and in use
        model.gradient_checkpointing_enable()


@change("forward_hook")
def a_hook_called_like_one_of_transformers(model: PreTrainedModel, draw: random.Random) -> None:
    model.get_input_embeddings().register_forward_hook(foreign.make_inputs_require_grads)


# Weights


@change("apart")
def a_scaled_weight(model: PreTrainedModel, draw: random.Random) -> None:
    with torch.no_grad():
        layer(model, draw).self_attn.v_proj.weight.mul_(draw.uniform(1.5, 3))


@change("apart")
def a_merged_delta(model: PreTrainedModel, draw: random.Random) -> None:
    weight = layer(model, draw).mlp.down_proj.weight
    weight.data += torch.randn(weight.shape[0], 4) @ torch.randn(4, weight.shape[1])


@change("apart")
def a_replaced_parameter(model: PreTrainedModel, draw: random.Random) -> None:
    owner = layer(model, draw).mlp.up_proj
    owner.weight = nn.Parameter(torch.randn_like(owner.weight))


@change("apart")
def a_loaded_checkpoint(model: PreTrainedModel, draw: random.Random) -> None:
    state = {name: 1.5 * tensor for name, tensor in model.state_dict().items()}
    model.load_state_dict(state)


@change("apart")
def a_bias_that_was_none(model: PreTrainedModel, draw: random.Random) -> None:
    owner = layer(model, draw).self_attn.o_proj
    owner.bias = nn.Parameter(torch.randn(owner.out_features))


@change("apart")
def an_embedding_written_past_autograd(model: PreTrainedModel, draw: random.Random) -> None:
    weight = model.get_input_embeddings().weight
    for row in range(40, 60):  # the prompt has some of these tokens
        weight.data[row] = weight.data.mean(0) * 40


@change("adapter")
def an_adapter(model: PreTrainedModel, draw: random.Random) -> None:
    model.peft_config = {"default": object()}
