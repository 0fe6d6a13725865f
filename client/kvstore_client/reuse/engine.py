"""Interface of an engine: token embeddings, rotary tables, computing the KV of single chunks, and decoder layers that
attend to given keys and values."""

from dataclasses import dataclass
from typing import Protocol

import torch

from kvstore_client.buffers import KVBuffers
from kvstore_client.reuse.capture import KeyCapture
from kvstore_client.reuse.identity import DescribedModel
from kvstore_codec.rope import RotaryTable


class TokenEmbeddings(Protocol):
    """Input embeddings of `tokens`, i64 `[tokens]`: `[tokens, hidden]` in host memory, in the model's dtype. Any thread
    may call it while the model computes."""

    def __call__(self, tokens: torch.Tensor, /) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class Projected:
    """A layer's projections of its tokens, `[heads, tokens, head_dim]` each; queries and keys are rotated."""

    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    unrotated_keys: torch.Tensor


class DecoderLayers(Protocol):
    """A model's layers, split into projection of queries, keys and values, and the part behind attention. Hidden states
    are `[1, tokens, hidden]`, in the model's dtype and on its device. Called in inference mode, by one thread at a
    time."""

    @property
    def layers(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def scale(self, layer: int) -> float:
        """Scale factor of the query-key products."""
        ...

    def window(self, layer: int) -> int | None:
        """Number of tokens, itself included, that a token of this layer attends to; None: all before it."""
        ...

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Hidden states that enter layer 0, for `tokens`, i64 `[tokens]`."""
        ...

    def project(self, layer: int, hidden: torch.Tensor, rotary: RotaryTable) -> Projected:
        """Queries, keys and values of `hidden`, at the positions of `rotary`."""
        ...

    def queries(self, layer: int, hidden: torch.Tensor, rotary: RotaryTable) -> torch.Tensor:
        """The queries of `project` alone, rotated, `[heads, tokens, head_dim]`."""
        ...

    def finish(self, layer: int, hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """Hidden states that leave the layer, from its attention output `[heads, tokens, head_dim]`."""
        ...


class Engine(Protocol):
    """A loaded model. One thread at a time calls it, except for `embed` and `look`."""

    @property
    def device(self) -> torch.device:
        """Device of the model. On a CPU a call's work is done when the call returns."""
        ...

    @property
    def embed(self) -> TokenEmbeddings: ...

    @property
    def decoder(self) -> DecoderLayers | None:
        """None for a model that can reuse only a prompt's prefix."""
        ...

    def look(self, tokens: torch.Tensor | None = None) -> DescribedModel:
        """Inspect the model now, and in particular the embeddings of `tokens`, i64 `[tokens]`. Any thread may call
        it."""
        ...

    def renew_hooks(self) -> None:
        """Install the key hooks again after the model has changed, so that the active KeyCapture sees its keys before
        RoPE."""
        ...

    def rotary(self, tokens: int) -> tuple[RotaryTable, ...]:
        """Rotary table of each layer for positions from 0 on, in host memory, in the model's dtype."""
        ...

    def compute(self, tokens: torch.Tensor, buffers: KVBuffers, capture: KeyCapture) -> None:
        """Compute the KV of `tokens`, i64 `[tokens]`, into `buffers`, keys rotated, behind the `capture.first_token`
        tokens whose KV is there. Called in inference mode, while `capture` is active and records the keys before
        RoPE."""
        ...
