"""Observes what a calibration is fitted to: a model's KV, its queries, and its sensitivity to errors in KV."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from kvstore_client.engines.transformers.capture import attention_modules, watch_heads
from kvstore_client.engines.transformers.rotary import inverse_frequencies, rotary_tables
from kvstore_client.engines.transformers.spec import describe
from kvstore_codec.calibration import token_features
from kvstore_codec.errors import UnsupportedModelError
from kvstore_codec.rope import RotaryTable, rotate_


@dataclass(frozen=True, slots=True)
class PrefilledText:
    """One text after a prefill, f32 on the model's device."""

    keys: torch.Tensor
    """Before RoPE, `[layers, kv_heads, tokens, head_dim]`."""
    values: torch.Tensor
    """`[layers, kv_heads, tokens, head_dim]`."""
    queries: torch.Tensor
    """Before RoPE, `[layers, heads, tokens, head_dim]`."""
    features: torch.Tensor
    """`[tokens, 2 * hidden]`, see `token_features`."""


class ObservedModel:
    """Observes a model of a supported family for a calibration.

    The ModelSpec is read first; then the weights are cast to f32 in place, because half precision hides gradients and
    small divergences. The weights no longer require gradients. Raises UnsupportedModelError for a model whose KV cannot
    be reused, or that was modified (hooks, patches): other workers would use its calibration.
    """

    def __init__(self, model: PreTrainedModel, model_id: str | None = None) -> None:
        described = describe(model, model_id)
        if described.refusal is not None:
            raise UnsupportedModelError(f"{described.spec.model_id}: {described.refusal.detail}")
        self.spec = described.spec
        self._attentions = attention_modules(model)
        self.model = model.float().eval().requires_grad_(requires_grad=False)
        self.hidden_size: int = model.get_input_embeddings().weight.shape[1]

    @property
    def longest_text(self) -> int:
        """Length of the longest text that the model accepts, tokens."""
        return int(self.model.config.max_position_embeddings)

    @torch.no_grad()
    def prefill(self, tokens: torch.Tensor) -> PrefilledText:
        """Prefill `tokens`, i64 `[tokens]`, from position 0 on."""
        seen: dict[tuple[str, int], torch.Tensor] = {}
        cache = DynamicCache()
        ids = tokens.unsqueeze(0).to(self.model.device)
        with self._watching(seen):
            self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        layers = range(self.spec.layers)
        return PrefilledText(
            torch.stack([seen["k", layer] for layer in layers]),
            torch.stack([cache.layers[layer].values[0] for layer in layers]),
            torch.stack([seen["q", layer] for layer in layers]),
            token_features(self.model.get_input_embeddings()(ids)[0]),
        )

    def fisher(
        self, text: PrefilledText, continuation: torch.Tensor, generator: torch.Generator, *, sinks: int
    ) -> torch.Tensor:
        """Mean squared gradient per layer for K and V, f32 `[layers, 2]`, over the tokens after the first `sinks`.

        The gradient is that of the log-likelihood of one label per token of `continuation`, `[tokens]`. `generator` (on
        the CPU) draws the labels from the model's own predictions.
        """
        keys, values = (
            [tensor.clone().requires_grad_() for tensor in part] for part in (text.keys, text.values)
        )
        tables = self._rotary(text.keys.shape[2])
        cache = DynamicCache()
        for layer, table in enumerate(tables):
            cache.update(_rotated(keys[layer], table)[None], values[layer][None], layer)
        with torch.enable_grad():
            logits = self._continue(cache, continuation)
            drawn = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator)[:, 0]
            loss = nn.functional.cross_entropy(logits, drawn.to(logits.device), reduction="sum")
            gradients = torch.autograd.grad(loss, keys + values)
        means = torch.stack([gradient[:, sinks:].square().mean() for gradient in gradients])
        return means.view(2, -1).T

    @torch.no_grad()
    def log_probabilities(
        self, keys: torch.Tensor, values: torch.Tensor, continuation: torch.Tensor
    ) -> torch.Tensor:
        """Log-probabilities at each token of `continuation`, `[tokens]`, behind this KV (keys before RoPE), f32
        `[tokens, vocabulary]`."""
        cache = DynamicCache()
        for layer, table in enumerate(self._rotary(keys.shape[2])):
            rotated = keys[layer].clone()
            rotate_(rotated, table)
            cache.update(rotated[None], values[layer][None], layer)
        return self._continue(cache, continuation).log_softmax(-1)

    @torch.no_grad()
    def output_weight(self) -> torch.Tensor:
        """W_o^T W_o, summed over the query heads of each KV head, in host memory, `[layers, kv_heads, head_dim,
        head_dim]`."""
        heads, dim = self.spec.kv_heads, self.spec.head_dim
        weights = []
        for attention in self._attentions:
            weight = attention.get_submodule("o_proj").weight
            assert isinstance(weight, torch.Tensor)  # noqa: S101  # narrows nn.Module's attribute type
            # Rows are grouped by KV head: [kv_heads, its query heads * hidden, head_dim].
            rows = weight.float().T.reshape(heads, -1, dim, weight.shape[0]).transpose(2, 3).flatten(1, 2)
            weights.append((rows.transpose(1, 2) @ rows).cpu())
        return torch.stack(weights)

    def inverse_frequencies(self) -> torch.Tensor:
        """Inverse frequencies of RoPE, radians per token, `[layers, rotary_dim / 2]`."""
        return inverse_frequencies(self.model)

    def _continue(self, cache: DynamicCache, continuation: torch.Tensor) -> torch.Tensor:
        ids = continuation.unsqueeze(0).to(self.model.device)
        logits: torch.Tensor = self.model(ids, past_key_values=cache, use_cache=True).logits[0]
        return logits.float()

    def _rotary(self, tokens: int) -> tuple[RotaryTable, ...]:
        return rotary_tables(self.model, tokens, torch.float32, self.model.device)

    @contextmanager
    def _watching(self, seen: dict[tuple[str, int], torch.Tensor]) -> Iterator[None]:
        """Record the queries and keys of every layer before RoPE, `[heads, tokens, head_dim]`."""

        def note(kind: str, layer: int, heads: torch.Tensor) -> None:
            seen[kind, layer] = heads[0].transpose(0, 1)

        hooks = []
        try:
            for layer, attention in enumerate(self._attentions):
                hooks.append(watch_heads(attention, "q", partial(note, "q", layer)))
                hooks.append(watch_heads(attention, "k", partial(note, "k", layer)))
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _rotated(keys: torch.Tensor, table: RotaryTable) -> torch.Tensor:
    """Like `rotate_`, but into a new tensor through which gradients flow."""
    size = table.cos.shape[-1]
    turned, rest = keys[..., :size], keys[..., size:]
    first, second = turned.chunk(2, dim=-1)
    return torch.cat((turned * table.cos + torch.cat((-second, first), -1) * table.sin, rest), -1)
