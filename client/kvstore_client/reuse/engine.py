"""What reuse asks of an engine: token embeddings, rotary tables, the KV of some chunks, and decoder layers that attend
to keys and values they are given."""

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
    """What a layer makes of its tokens, `[heads, tokens, head_dim]` each; queries and keys are rotated."""

    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    unrotated_keys: torch.Tensor


class DecoderLayers(Protocol):
    """A model's layers, cut open where keys and values are made and where they are attended to. Hidden states are
    `[1, tokens, hidden]`, in the model's dtype and on its device. Called in inference mode, by one thread at a time."""

    @property
    def layers(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def scale(self, layer: int) -> float:
        """Factor of the products of queries and keys."""
        ...

    def window(self, layer: int) -> int | None:
        """Number of tokens, itself included, that a token of this layer attends to; None: all before it."""
        ...

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Hidden states that enter layer 0, of `tokens`, i64 `[tokens]`."""
        ...

    def project(self, layer: int, hidden: torch.Tensor, rotary: RotaryTable) -> Projected:
        """Queries, keys and values of `hidden`, at the positions of `rotary`."""
        ...

    def finish(self, layer: int, hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """Hidden states that leave the layer, from the output of its attention, `[heads, tokens, head_dim]`."""
        ...


class Engine(Protocol):
    """A loaded model. Called by one thread at a time, but for `embed` and `look`."""

    @property
    def device(self) -> torch.device:
        """Where the model computes. On a processor a call's work is done when the call returns."""
        ...

    @property
    def embed(self) -> TokenEmbeddings: ...

    @property
    def decoder(self) -> DecoderLayers | None:
        """None for a model of which only the beginning of a prompt can be reused."""
        ...

    def look(self, tokens: torch.Tensor | None = None) -> DescribedModel:
        """What the model is now, the embeddings of `tokens`, i64 `[tokens]`, in particular. Any thread may call it."""
        ...

    def renew_hooks(self) -> None:
        """The model is another than it was: have its keys before RoPE noted by the active KeyCapture again."""
        ...

    def rotary(self, tokens: int) -> tuple[RotaryTable, ...]:
        """How each layer rotates keys at positions from 0 on, in host memory, in the model's dtype."""
        ...

    def compute(self, tokens: torch.Tensor, buffers: KVBuffers, capture: KeyCapture) -> None:
        """Put the KV of `tokens`, i64 `[tokens]`, into `buffers`, keys rotated, behind the `capture.first_token` tokens
        whose KV lies there. Called in inference mode, while `capture` is active: it is told the keys before RoPE."""
        ...
