"""Taking keys before RoPE out of a running model."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from kvstore_client.engines.transformers.identity.modules import uncompiled
from kvstore_codec.errors import UnsupportedModelError

# Families whose attention norms `[batch, heads, tokens, head_dim]`, by how its class is called.
_HEADS_BEFORE_TOKENS = ("Gemma",)

_active: ContextVar["KeyCapture | None"] = ContextVar("kvstore_key_capture", default=None)


class KeyCapture:
    """The keys that one `generate` call put into its cache, before RoPE, in the order of its forward passes.

    A hook notes what a layer's key projection returned last; it counts only when that layer of this call's cache then
    takes as many tokens. Forward passes that go through another cache (a logits processor that asks the model, say)
    leave no trace. Holds references; nothing is copied until `keys` is called.
    """

    def __init__(self, layers: int, first_token: int) -> None:
        self.first_token = first_token
        """Position of the first captured token: those before it were reused."""
        self._latest: list[torch.Tensor | None] = [None] * layers
        self._steps: list[list[torch.Tensor]] = [[] for _ in range(layers)]
        self._began_s = time.perf_counter()
        self.first_pass_s = 0.0
        """How long the first forward pass took, about: seen when its last layer begins."""

    def projected(self, layer: int, keys: torch.Tensor) -> None:
        """A forward pass computed these keys, `[batch, tokens, kv_heads, head_dim]`."""
        self._latest[layer] = keys.detach()

    def cached(self, layer: int, tokens: int) -> None:
        """The cache took `tokens` more tokens of this layer: those that were projected just before."""
        latest, self._latest[layer] = self._latest[layer], None
        if latest is not None and tuple(latest.shape[:2]) == (1, tokens):
            self._steps[layer].append(latest[0])
        layers = len(self._latest)
        if not self.first_pass_s and layer == layers - 1:
            self.first_pass_s = (time.perf_counter() - self._began_s) * layers / max(1, layers - 1)

    def reaches(self, tokens: int) -> bool:
        """Whether the keys of every layer end at this position: none is missing, none too many."""
        return all(self.first_token + sum(map(len, steps)) == tokens for steps in self._steps)

    def has_step_to(self, layer: int, position: int) -> bool:
        """Whether the keys of a layer end at this position, or did before the latest forward pass reached it."""
        steps = self._steps[layer]
        end = self.first_token + sum(map(len, steps))
        return position == end or (bool(steps) and position == end - len(steps[-1]))

    def keys(self, layer: int, begin: int, end: int) -> torch.Tensor:
        """Keys of tokens `begin` to `end` (positions in the prompt), `[kv_heads, tokens, head_dim]`."""
        pieces: list[torch.Tensor] = []
        position = self.first_token
        for step in self._steps[layer]:
            low, high = max(begin - position, 0), min(end - position, len(step))
            if low < high:
                pieces.append(step[low:high])
            position += len(step)
            if position >= end:
                break
        keys = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        return keys.transpose(0, 1)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Record the forward passes that this thread makes meanwhile."""
        token = _active.set(self)
        try:
            yield
        finally:
            _active.reset(token)


def attention_modules(model: PreTrainedModel) -> list[nn.Module]:
    """The attention of each layer, in order. Raises UnsupportedModelError if keys cannot be taken from all of them."""
    modules = dict.fromkeys(map(uncompiled, model.modules()))
    attentions = [m for m in modules if hasattr(m, "k_proj") and hasattr(m, "layer_idx")]
    if len(attentions) != model.config.num_hidden_layers:
        raise UnsupportedModelError(
            f"{type(model).__name__}: found {len(attentions)} attention modules with a k_proj for "
            f"{model.config.num_hidden_layers} layers; keys before RoPE cannot be taken from it"
        )
    return sorted(attentions, key=lambda attention: int(attention.layer_idx))  # type: ignore[arg-type]


def install_hooks(model: PreTrainedModel) -> list[torch.utils.hooks.RemovableHandle]:
    """Have each layer's keys before RoPE noted by the KeyCapture that is active in the thread, if any."""
    return [
        watch_heads(attention, "k", partial(_note_keys, layer))
        for layer, attention in enumerate(attention_modules(model))
    ]


def watch_heads(
    attention: nn.Module, kind: Literal["q", "k"], see: Callable[[torch.Tensor], None]
) -> torch.utils.hooks.RemovableHandle:
    """Show `see` the queries or keys of every forward pass before RoPE, `[batch, tokens, heads, head_dim]`.

    They are what leaves the projection, or the norm behind it (Qwen3, Gemma 3). Raises UnsupportedModelError.
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
    """A forward hook of one module. It stays behind when the model is copied or pickled: what the copy computes is no
    business of whoever watches the original."""

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
    """What stands for a hook of ours in a copy of the model."""
    return _see_nothing


def _see_nothing(_module: nn.Module, _inputs: object, _output: object) -> None: ...


def _note_keys(layer: int, keys: torch.Tensor) -> None:
    capture = _active.get()
    if capture is not None:
        capture.projected(layer, keys)
