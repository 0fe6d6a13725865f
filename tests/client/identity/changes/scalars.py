"""Changes of scalars: epsilons, scalings, windows, masks, precision."""

import random
from typing import Any

import torch
from transformers import PreTrainedModel

from tests.client.identity.changes.base import Undo, change, layer, norm, replaced


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
