"""What selective recompute is about: chunks reused behind another text than theirs, and which of their tokens are worth
computing again."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from kvstore_codec.errors import ConfigurationError
from kvstore_codec.token_order import TokenOrder

ShareOf = Literal["chunk", "document", "prompt"]


@dataclass(frozen=True, slots=True)
class ReusedChunk:
    """A stored chunk in a prompt."""

    tokens: range
    """Its positions in the prompt."""
    exact: bool
    """Stored behind the very text that stands before it now: nothing of it is computed again."""
    begins_text: bool = False
    """Nothing stood before it when it was stored: its first tokens took the attention that goes to a beginning."""
    order: TokenOrder | None = None
    """Which of its tokens matter most, if that was stored with it."""
    content_id: bytes = b""
    """Of its tokens, wherever they stand."""
    document: int | None = None
    """Chunks with the same number were stored as neighbours in one segment; None: it is one of its own."""


class Probe(Protocol):
    """What a selector may ask the engine for. Computed when asked for; asking costs time."""

    def question_attention(self, see: Callable[[torch.Tensor], None], every: int = 1) -> None:
        """Calls `see(weights)` for one layer of `every` (the last of them), first layer first: the softmax attention of
        the question's tokens, if it is long of its last ones, over the whole prompt, f32
        `[heads, question_tokens, prompt_tokens]`. Valid during the call only."""

    def fresh_kv(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K (before RoPE) and V of all reused tokens at `layer`, or the last there is, computed anew from layer 0 on in
        full, each `[kv_heads, tokens, head_dim]`, tokens in order of position."""

    def stored_kv(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The same tokens' K (before RoPE) and V as they are stored, in the same shape."""


class Selector(Protocol):
    """Says how much computing a token again is worth. Without state that a caller could see; thread-safe."""

    @property
    def name(self) -> str: ...

    @property
    def share_of(self) -> ShareOf:
        """What the ratio is a share of: as many of each chunk or document, or the best of the whole prompt."""

    @property
    def needs_kv(self) -> bool:
        """True: it asks the probe, so everything must have arrived first. False: it knows its tokens beforehand, and
        these need not travel."""

    def scores(self, chunks: Sequence[ReusedChunk], prompt_tokens: int, probe: Probe | None) -> torch.Tensor:
        """f32 `[prompt_tokens]`, higher is more worth computing; what it says of tokens outside `chunks` and inside
        exact ones is not used. `chunks` do not overlap and are in order of position; `probe` is given where
        `needs_kv`."""


def positions_of(chunks: Sequence[ReusedChunk]) -> torch.Tensor:
    """i64 `[tokens]`: the positions of all their tokens, one chunk after the other."""
    ranges = [torch.arange(chunk.tokens.start, chunk.tokens.stop, device="cpu") for chunk in chunks]
    return torch.cat(ranges) if ranges else torch.empty(0, dtype=torch.int64, device="cpu")


def require_probe(selector: Selector, probe: Probe | None) -> Probe:
    """Raises ConfigurationError where there is none: a mistake of the engine that asks."""
    if probe is None:
        raise ConfigurationError(f"selector {selector.name!r} needs the KV that was fetched to choose by")
    return probe
