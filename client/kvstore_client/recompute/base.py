"""Interface of selective recompute: chunks reused behind another text than their own, and the selectors that choose
which of their tokens to recompute."""

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
    """Positions of the chunk in the prompt."""
    exact: bool
    """Stored behind the text that precedes it in the prompt: nothing of it is recomputed."""
    begins_text: bool = False
    """It was the first chunk of its text when it was stored: its first tokens were attention sinks."""
    order: TokenOrder | None = None
    """Tokens ordered by importance, if that was stored with the chunk."""
    content_id: bytes = b""
    """Id of its tokens, independent of position."""
    document: int | None = None
    """Chunks with the same number were stored as neighbours in one segment; None: the chunk is a document of its
    own."""


class Probe(Protocol):
    """Engine queries for selectors. Results are computed on demand, which takes time."""

    def question_attention(self, see: Callable[[torch.Tensor], None], every: int = 1) -> None:
        """Calls `see(weights)` for one layer of `every` (the last of them), first layer first. `weights` are the
        softmax attention of the question's tokens (the last ones of a long question) over the whole prompt, f32
        `[heads, question_tokens, prompt_tokens]`, valid during the call only."""

    def fresh_kv(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K (before RoPE) and V of all reused tokens at `layer`, or at the last layer, fully recomputed from layer 0
        on, each `[kv_heads, tokens, head_dim]`, tokens ordered by position."""

    def stored_kv(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K (before RoPE) and V of the same tokens as stored, in the same shape."""


class Selector(Protocol):
    """Scores tokens by how much recomputing them is worth. Has no visible state; thread-safe."""

    @property
    def name(self) -> str: ...

    @property
    def share_of(self) -> ShareOf:
        """What the ratio applies to: each chunk, each document, or the whole prompt."""

    @property
    def needs_kv(self) -> bool:
        """True: the selector uses the probe, so all KV must have arrived first. False: it selects in advance, and the
        selected tokens need not be fetched."""

    def scores(self, chunks: Sequence[ReusedChunk], prompt_tokens: int, probe: Probe | None) -> torch.Tensor:
        """Scores, f32 `[prompt_tokens]`; higher is more worth recomputing. Scores outside `chunks` and inside exact
        ones are ignored. `chunks` do not overlap and are ordered by position; `probe` is given where `needs_kv`."""


def positions_of(chunks: Sequence[ReusedChunk]) -> torch.Tensor:
    """Positions of all tokens of the chunks, i64 `[tokens]`, one chunk after the other."""
    ranges = [torch.arange(chunk.tokens.start, chunk.tokens.stop, device="cpu") for chunk in chunks]
    return torch.cat(ranges) if ranges else torch.empty(0, dtype=torch.int64, device="cpu")


def require_probe(selector: Selector, probe: Probe | None) -> Probe:
    """The probe. Raises ConfigurationError where there is none, which is a bug in the engine's adapter."""
    if probe is None:
        raise ConfigurationError(f"selector {selector.name!r} needs the fetched KV to choose by")
    return probe
