"""Changes of a loaded model that its ModelSpec does not tell."""

import copy
from collections.abc import Callable

import torch
from transformers import PreTrainedModel


def attentions(model: PreTrainedModel) -> list[torch.nn.Module]:
    return [layer.self_attn for layer in model.get_decoder().layers]


def hooked(model: PreTrainedModel) -> None:
    model.get_decoder().layers[2].register_forward_hook(lambda _m, _i, output: output * 1.1)


def head_permuted(model: PreTrainedModel) -> None:
    """As an adapter would that takes heads for something else."""
    for attention in attentions(model):
        plain, dim = attention.k_proj.forward, attention.head_dim
        attention.k_proj.forward = lambda x, plain=plain, dim=dim: (
            plain(x).unflatten(-1, (-1, dim)).flip(-2).flatten(-2)
        )


def int8_weights(model: PreTrainedModel) -> None:
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            weight = module.weight.detach().float()
            scale = weight.abs().amax(1, keepdim=True) / 127
            rounded = ((weight / scale).round() * scale).to(module.weight.dtype)
            module.forward = lambda x, w=rounded, b=module.bias: torch.nn.functional.linear(x, w, b)


def epsilon(model: PreTrainedModel) -> None:
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon *= 10


def rounded_frequencies(model: PreTrainedModel) -> None:
    rotary = model.get_decoder().rotary_emb
    rounded = copy.deepcopy(rotary)
    rounded.inv_freq = rotary.inv_freq.bfloat16().float()
    rotary.forward = rounded.forward


def scaled_attention(model: PreTrainedModel) -> None:
    for attention in attentions(model):
        plain = attention.forward
        attention.forward = lambda *a, plain=plain, **k: (plain(*a, **k)[0] * 1.01, None)


def other_activation(model: PreTrainedModel) -> None:
    for layer in model.get_decoder().layers:
        layer.mlp.act_fn.forward = torch.nn.functional.gelu


CHANGES: dict[str, Callable[[PreTrainedModel], None]] = {
    "a hook that steers one layer by 10 %": hooked,
    "attention's output scaled by 1.01": scaled_attention,
    "weights rounded to 8 bits": int8_weights,
    "heads of the keys in another order": head_permuted,
    "RoPE frequencies rounded to bfloat16": rounded_frequencies,
    "the norms' epsilon times 10": epsilon,
    "another activation": other_activation,
}
"""What changes a model's KV and not its digest, when it is done before the model is wrapped."""
