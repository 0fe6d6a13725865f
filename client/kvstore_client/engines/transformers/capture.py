"""Hooks that capture keys before RoPE, and queries, from a running model."""

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from kvstore_client.engines.transformers.identity.modules import uncompiled
from kvstore_client.reuse.capture import active_capture
from kvstore_codec.errors import UnsupportedModelError

# Class name prefixes of the families whose norms see `[batch, heads, tokens, head_dim]`.
_HEADS_BEFORE_TOKENS = ("Gemma",)


def attention_modules(model: PreTrainedModel) -> list[nn.Module]:
    """The attention module of each layer, in order. Raises UnsupportedModelError if some layer's keys cannot be
    captured."""
    modules = dict.fromkeys(map(uncompiled, model.modules()))
    attentions = [m for m in modules if hasattr(m, "k_proj") and hasattr(m, "layer_idx")]
    if len(attentions) != model.config.num_hidden_layers:
        raise UnsupportedModelError(
            f"{type(model).__name__}: found {len(attentions)} attention modules with a k_proj for "
            f"{model.config.num_hidden_layers} layers; keys before RoPE cannot be taken from it"
        )
    return sorted(attentions, key=lambda attention: int(attention.layer_idx))  # type: ignore[arg-type]


def install_hooks(model: PreTrainedModel) -> list[torch.utils.hooks.RemovableHandle]:
    """Report each layer's keys before RoPE to the KeyCapture that is active in the calling thread, if any."""
    return [
        watch_heads(attention, "k", partial(_note_keys, layer))
        for layer, attention in enumerate(attention_modules(model))
    ]


def watch_heads(
    attention: nn.Module, kind: Literal["q", "k"], see: Callable[[torch.Tensor], None]
) -> torch.utils.hooks.RemovableHandle:
    """Call `see` with the queries or keys of every forward pass before RoPE, `[batch, tokens, heads, head_dim]`.

    They are the output of the projection, or of the norm behind it (Qwen3, Gemma 3). Raises UnsupportedModelError.
    """
    name = next((name for name in (f"{kind}_norm", f"{kind}_proj") if hasattr(attention, name)), None)
    if name is None:
        raise UnsupportedModelError(
            f"{type(attention).__name__} has neither {kind}_norm nor {kind}_proj; its heads cannot be seen"
        )
    projection = attention.get_submodule(name)
    head_dim = int(attention.head_dim)  # type: ignore[arg-type]
    heads_first = name.endswith("_norm") and type(attention).__name__.startswith(_HEADS_BEFORE_TOKENS)
    return projection.register_forward_hook(_SeeHeads(see, head_dim, heads_first=heads_first))


class _SeeHeads:
    """A forward hook of one module. Copies and pickles of the model get a no-op instead: a copy is not observed."""

    def __init__(self, see: Callable[[torch.Tensor], None], head_dim: int, *, heads_first: bool) -> None:
        self._see, self._head_dim, self._heads_first = see, head_dim, heads_first

    def __call__(self, _module: nn.Module, _inputs: object, output: torch.Tensor) -> None:
        if self._heads_first:
            output = output.transpose(1, 2)
        elif output.dim() == 3:
            output = output.view(*output.shape[:2], -1, self._head_dim)
        self._see(output)

    def __reduce__(self) -> tuple[Callable[[], object], tuple[()]]:
        return _blind_hook, ()


def _blind_hook() -> Callable[[nn.Module, object, object], None]:
    """The no-op hook for a copy of the model."""
    return _see_nothing


def _see_nothing(_module: nn.Module, _inputs: object, _output: object) -> None: ...


def _note_keys(layer: int, keys: torch.Tensor) -> None:
    capture = active_capture()
    if capture is not None:
        capture.projected(layer, keys)
