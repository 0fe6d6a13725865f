"""What a blend has to give, from the model's own forward pass over the whole prompt: hooks put stored keys and values
in place of those that it computes, so that masks, windows, RoPE and everything else are transformers' own."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from kvstore_client.buffers import BufferPool, KVBuffers
from kvstore_client.engines.transformers.decoder import Decoder
from kvstore_client.engines.transformers.rotary import rotary_tables
from kvstore_client.engines.transformers.spec import spec_of
from kvstore_client.recompute import ReusedChunk
from kvstore_client.recompute.base import positions_of
from kvstore_client.reuse.blend import Blend
from kvstore_codec.rope import rotate_
from tests.client.models import random_prompt, tiny_model

Change = Callable[[int, torch.Tensor], None]
"""Changes what a layer computed, `[tokens, heads, head_dim]`, in place."""


@contextmanager
def seen(model: PreTrainedModel, on_keys: Change, on_values: Change) -> Iterator[None]:
    """Show keys (before RoPE) and values of all layers to these while the model computes."""
    hooks = []

    def watch(module: nn.Module, layer: int, head_dim: int, change: Change) -> None:
        def hook(_module: nn.Module, _inputs: object, output: torch.Tensor) -> torch.Tensor:
            changed = output.clone()
            change(layer, changed.view(changed.shape[1], -1, head_dim))
            return changed

        hooks.append(module.register_forward_hook(hook))

    for layer, block in enumerate(model.get_decoder().layers):
        attention = block.self_attn
        watch(getattr(attention, "k_norm", attention.k_proj), layer, attention.head_dim, on_keys)
        watch(attention.v_proj, layer, attention.head_dim, on_values)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@dataclass
class KV:
    """Keys before RoPE and values, `[layers, kv_heads, tokens, head_dim]` each."""

    keys: torch.Tensor
    values: torch.Tensor


def kv_of(model: PreTrainedModel, tokens: torch.Tensor) -> KV:
    """As the model computes it, of `tokens`, i64 `[tokens]`."""
    keys: list[torch.Tensor] = []
    values: list[torch.Tensor] = []
    with (
        torch.inference_mode(),
        seen(model, lambda _, k: keys.append(k.clone()), lambda _, v: values.append(v.clone())),
    ):
        model(tokens[None])
    return KV(*(torch.stack(layers).transpose(1, 2) for layers in (keys, values)))


@dataclass
class Prompt:
    """A prompt whose chunks' KV comes from somewhere else."""

    model: PreTrainedModel
    tokens: torch.Tensor
    chunks: list[ReusedChunk]
    question: int
    stored: KV
    """Of all tokens; NaN where nothing is stored."""
    waited: list[int] = field(default_factory=list)
    """Layers that were waited for."""

    @property
    def approximate(self) -> torch.Tensor:
        return positions_of([chunk for chunk in self.chunks if not chunk.exact])

    def blend(self, keep: Sequence[range] = ()) -> Blend:
        """A new one, the KV of whose layers comes when it is waited for."""
        spec = spec_of(self.model)
        total = len(self.tokens)
        buffers: KVBuffers = BufferPool(0).acquire(spec, total)
        buffers.keys.fill_(torch.nan)
        buffers.values.fill_(torch.nan)
        rotary = rotary_tables(self.model, total, spec.dtype.torch, "cpu")[0]
        reused = positions_of(self.chunks)
        rotated = self.stored.keys.clone()
        rotate_(rotated, rotary)
        there: set[int] = set()

        def arrived(layer: int) -> None:
            self.waited.append(layer)
            if layer not in there:
                there.add(layer)
                buffers.keys[layer][:, reused] = rotated[layer][:, reused]
                buffers.values[layer][:, reused] = self.stored.values[layer][:, reused]

        return Blend(
            Decoder(self.model), self.tokens, self.chunks, self.question, buffers, rotary, arrived, keep
        )

    def expected(self, selected: torch.Tensor) -> tuple[torch.Tensor, KV, DynamicCache]:
        """Log-probabilities `[tokens, vocabulary]` where the tokens of all chunks but the `selected` have the stored
        KV (meaningless for those tokens themselves), and all tokens' KV, as made and as the cache has it."""
        reused = torch.zeros(len(self.tokens), dtype=torch.bool)
        reused[positions_of(self.chunks)] = True
        reused[selected] = False
        made = KV(self.stored.keys.clone(), self.stored.values.clone())

        def put(of: torch.Tensor) -> Change:
            def change(layer: int, computed: torch.Tensor) -> None:
                computed[reused] = of[layer].transpose(0, 1)[reused]
                of[layer] = computed.transpose(0, 1)

            return change

        cache = DynamicCache()
        with torch.inference_mode(), seen(self.model, put(made.keys), put(made.values)):
            logits = self.model(self.tokens[None], past_key_values=cache).logits[0]
        return logits.float().log_softmax(-1), made, cache


def sharp(family: str, dtype: torch.dtype = torch.float32, **sizes: object) -> PreTrainedModel:
    """Random weights, but large enough for the model to mind what its KV is."""
    model = tiny_model(family, **sizes)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model.to(dtype)


LAYOUT: tuple[tuple[int, bool], ...] = (
    (64, True),
    (30, False),
    (64, False),
    (64, False),
    (11, False),
    (64, False),
)
"""Pieces of a prompt: tokens, and whether it is exact. Those of 64 are chunks."""


def prompt(model: PreTrainedModel, question: int = 20, *, all_exact: bool = False, seed: int = 1) -> Prompt:
    """A system prefix, two documents of one chunk and a tail or more, something new, a document, and a question. The
    approximate chunks' KV was computed behind another text."""
    total = sum(tokens for tokens, _ in LAYOUT) + question
    tokens = random_prompt(total, seed=seed)[0]
    own = kv_of(model, tokens)
    stored = KV(torch.full_like(own.keys, torch.nan), torch.full_like(own.values, torch.nan))
    chunks: list[ReusedChunk] = []
    first = 0
    for number, (length, exact) in enumerate(LAYOUT):
        place = slice(first, first + length)
        if length == 64:
            exact = exact or all_exact
            other = random_prompt(96, seed=50 + number)[0]
            kv = own if exact else kv_of(model, torch.cat([other, tokens[place]]))
            source = place if exact else slice(96, None)
            stored.keys[:, :, place] = kv.keys[:, :, source]
            stored.values[:, :, place] = kv.values[:, :, source]
            chunks.append(ReusedChunk(range(place.start, place.stop), exact=exact))
        first += length
    return Prompt(model, tokens, chunks, total - question, stored)
