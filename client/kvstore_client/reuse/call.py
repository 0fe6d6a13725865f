"""A call of an engine as reuse sees it: a prompt, and passes of it through the model over a cache that reuse fills."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from kvstore_client.buffers import KVBuffers
from kvstore_client.recompute import Recompute
from kvstore_client.reuse.capture import KeyCapture

LayerArrives = Callable[[int], None]
"""Waits until the reused KV of a layer is in its buffers. Raises FetchIncompleteError when it will not be."""


@dataclass(frozen=True, slots=True)
class EngineOutput:
    """How a pass of a whole prompt ended."""

    output: Any
    """What the caller of the engine is given."""
    sequence: torch.Tensor
    """Tokens of the prompt and behind it the generated ones, i64 `[tokens]`."""


@dataclass(frozen=True, slots=True)
class ComputedKV:
    """What a pass left in its cache, to be kept when the buffers of the reused KV are given back."""

    tokens: int
    """Tokens whose KV is there, the reused ones counted."""
    values: tuple[torch.Tensor, ...]
    """By layer `[kv_heads, tokens, head_dim]`, from the first captured token on; empty if not asked for."""


class PromptPass(Protocol):
    """One pass of a whole prompt, and of what is generated behind it, over a cache of its own."""

    def run(self) -> EngineOutput:
        """Called once. Raises what the engine raises, FetchIncompleteError of a layer that will not arrive included."""
        ...

    def take(self, *, values: bool) -> ComputedKV:
        """What is in the cache. Called once, after `run` has returned; a cache that the caller did not ask for is empty
        afterwards."""
        ...

    def salvage(self) -> ComputedKV | None:
        """What is whole in the cache after `run` has raised: the KV of tokens that passed through all layers. None when
        there is none behind the reused tokens."""
        ...


class EngineCall(Protocol):
    """A prompt, and what the engine was asked to do with it."""

    @property
    def segments(self) -> Sequence[int] | None:
        """Lengths of the prompt's parts, where it was given in parts."""
        ...

    @property
    def recompute(self) -> Recompute | None:
        """How documents that are reused in another context are repaired, where the caller says so."""
        ...

    @property
    def prompt_tokens(self) -> int:
        """Number of tokens in all prompts of the call."""
        ...

    @property
    def tokens(self) -> torch.Tensor:
        """Of the prompt, i64 `[tokens]`, in a call that need not be passed through."""
        ...

    def bypass_reason(self) -> str | None:
        """Why this call must run without reuse now, in one word, or None when reuse gives what the plain call would."""
        ...

    def pass_through(self) -> Any:
        """Answer it without reuse."""
        ...

    def prompt_pass(
        self, capture: KeyCapture, reused: KVBuffers | None = None, arrives: LayerArrives | None = None
    ) -> PromptPass:
        """A pass over the first `capture.first_token` tokens in `reused`, each layer of which `arrives` is asked for
        before it is read (None: all are there). Without `reused`, over an empty cache. The captured tokens may be put
        into `reused` behind those. `capture` is active while the pass runs."""
        ...
