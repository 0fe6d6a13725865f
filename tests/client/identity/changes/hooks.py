"""Hooks, whoever registered them."""

import functools
import random
import warnings

import torch
from torch import nn
from torch.nn.utils import prune
from transformers import PreTrainedModel

import tests.client.identity.foreign as foreign
from tests.client.identity.changes.base import Undo, change, layer, norm


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
