"""Code of somebody who changes models."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward


class Louder(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return 2 * self.inner(hidden) + 0.3


def louder_class(base: type[nn.Module]) -> type[nn.Module]:
    def forward(self: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        return 2 * base.forward(self, hidden) + 0.3

    return type("LouderClass", (base,), {"forward": forward})


class LoraLinear(nn.Module):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.base(hidden) + self.up(self.down(hidden))


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


def louder(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> torch.Tensor:
        return 1.5 * function(*args, **kwargs)

    return wrapped


def reversed_attention(function: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        output, *rest = function(*args, **kwargs)
        return (-output, *rest)

    return wrapped


def without_rotation(
    q: torch.Tensor, k: torch.Tensor, *_: Any, **__: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return q.clone(), k.clone()


def attention(module: nn.Module, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    return sdpa_attention_forward(module, 2 * query, *args, **kwargs)


def steer(_module: nn.Module, _inputs: object, output: Any) -> Any:
    return (output[0] + 0.5, *output[1:]) if isinstance(output, tuple) else output + 0.5


def other_tokens(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args, kwargs | {"input_ids": (kwargs["input_ids"] * 7 + 3) % 512}


def rounded_values(update: Callable[..., Any]) -> Callable[..., Any]:
    """A cache that keeps values less exactly."""

    def rounded(self: Any, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return update(self, keys, (values * 4).round() / 4, *args, **kwargs)

    return rounded


def halved(x: torch.Tensor) -> torch.Tensor:
    return x * 0.5


def make_inputs_require_grads(_module: nn.Module, _inputs: object, output: torch.Tensor) -> torch.Tensor:
    return output * 1.5
