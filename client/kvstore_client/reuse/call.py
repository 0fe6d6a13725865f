"""Interface of an engine call: a prompt, and passes of it through the model over a cache with reused KV."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from kvstore_client.buffers import KVBuffers
from kvstore_client.recompute import Recompute
from kvstore_client.reuse.capture import KeyCapture
from kvstore_client.settings import Budget

LayerArrives = Callable[[int], None]
"""Waits until a layer's reused KV is in its buffers. Raises FetchIncompleteError when it will not arrive."""


@dataclass(frozen=True, slots=True)
class EngineOutput:
    """Result of a pass over a whole prompt."""

    output: Any
    """Return value for the engine's caller."""
    sequence: torch.Tensor
    """Tokens of the prompt followed by the generated ones, i64 `[tokens]`."""


@dataclass(frozen=True, slots=True)
class ComputedKV:
    """KV that a pass left in its cache. Stays valid after the buffers of the reused KV are released."""

    tokens: int
    """Number of tokens whose KV is in the cache, including the reused ones."""
    values: tuple[torch.Tensor, ...]
    """Values by layer, `[kv_heads, tokens, head_dim]`, from the first captured token on; empty if not requested."""


class PromptPass(Protocol):
    """One pass over a whole prompt, and over the tokens generated behind it, with a cache of its own."""

    def run(self) -> EngineOutput:
        """Run the pass. Called once. Raises the engine's errors, and FetchIncompleteError for a layer that will not
        arrive."""
        ...

    def take(self, *, values: bool) -> ComputedKV:
        """Take the KV out of the cache. Called once, after `run` has returned. Empties a cache that the caller did not
        ask for."""
        ...

    def salvage(self) -> ComputedKV | None:
        """KV of the tokens that passed through all layers, after `run` has raised. None when there is none behind the
        reused tokens."""
        ...


class EngineCall(Protocol):
    """A prompt, and what the engine is asked to do with it."""

    @property
    def segments(self) -> Sequence[int] | None:
        """Lengths of the prompt's segments; None for a prompt without segments."""
        ...

    @property
    def recompute(self) -> Recompute | None:
        """How documents reused in another context are repaired; None when the caller does not say."""
        ...

    @property
    def budget(self) -> Budget | None:
        """Share of a stored prefix's tokens that the rest of the prompt attends to, above 0 and up to 1, or AUTO; None:
        all of them, as in a plain prefill."""
        ...

    @property
    def prompt_tokens(self) -> int:
        """Number of tokens in all prompts of the call."""
        ...

    @property
    def tokens(self) -> torch.Tensor:
        """Token ids of the prompt, i64 `[tokens]`, in a call that may reuse KV."""
        ...

    def bypass_reason(self) -> str | None:
        """Why this call must run without reuse now, in one word; None when reuse gives the same result as the plain
        call."""
        ...

    def pass_through(self) -> Any:
        """Answer the call without reuse."""
        ...

    def prompt_pass(
        self,
        capture: KeyCapture,
        reused: KVBuffers | None = None,
        arrives: LayerArrives | None = None,
        left_out: int = 0,
        state: torch.Tensor | None = None,
    ) -> PromptPass:
        """A pass over the first `capture.first_token` tokens in `reused`. `arrives` is called for each layer before the
        layer is read (None: all layers are there). Without `reused`, a pass over an empty cache. The captured tokens
        may be written into `reused` behind the reused ones. `capture` is active while the pass runs.

        With `left_out`, that many of the first tokens are not in `reused` (and all layers are there): later tokens do
        not attend to them, and keep their positions. With `state`, the hidden state of the prompt's last token that
        leaves the last layer, `[1, 1, hidden]`, the token is computed and its KV in `reused` (and all layers are
        there): only its logits are left to compute."""
        ...
