"""Replaced modules, classes, methods and functions."""

import random
from types import MethodType

import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import tests.client.identity.foreign as foreign
from tests.client.identity.changes.base import Undo, change, layer, replaced


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
