"""Changes of weights."""

import random

import torch
from torch import nn
from transformers import PreTrainedModel

from tests.client.identity.changes.base import change, layer


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
