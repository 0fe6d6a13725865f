"""Captures the keys before RoPE of one engine call while it computes."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_active: ContextVar["KeyCapture | None"] = ContextVar("kvstore_key_capture", default=None)


class KeyCapture:
    """The keys that one `generate` call put into its cache, before RoPE, in the order of its forward passes.

    A hook records the latest output of a layer's key projection. The output counts only when that layer of this call's
    cache then takes as many tokens, so forward passes through another cache (a logits processor that calls the model,
    for example) leave no trace. Holds references; nothing is copied until `keys` is called.
    """

    def __init__(self, layers: int, first_token: int) -> None:
        self.first_token = first_token
        """Position of the first captured token; the tokens before it were reused."""
        self._latest: list[torch.Tensor | None] = [None] * layers
        self._steps: list[list[torch.Tensor]] = [[] for _ in range(layers)]
        self._began_s = time.perf_counter()
        self.first_pass_s = 0.0
        """Approximate duration of the first forward pass, measured when its last layer begins, seconds."""

    def projected(self, layer: int, keys: torch.Tensor) -> None:
        """Record the keys of a forward pass, `[batch, tokens, kv_heads, head_dim]`."""
        self._latest[layer] = keys.detach()

    def cached(self, layer: int, tokens: int) -> None:
        """Record that the cache took `tokens` more tokens of this layer: those projected just before."""
        latest, self._latest[layer] = self._latest[layer], None
        if latest is not None and tuple(latest.shape[:2]) == (1, tokens):
            self._steps[layer].append(latest[0])
        layers = len(self._latest)
        if not self.first_pass_s and layer == layers - 1:
            self.first_pass_s = (time.perf_counter() - self._began_s) * layers / max(1, layers - 1)

    def reaches(self, tokens: int) -> bool:
        """Whether the keys of every layer end at this position, with none missing and none extra."""
        return all(self.first_token + sum(map(len, steps)) == tokens for steps in self._steps)

    def has_step_to(self, layer: int, position: int) -> bool:
        """Whether a layer's keys end at this position, or did so before the latest forward pass reached the layer."""
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
        """Record the forward passes of this thread inside the block."""
        token = _active.set(self)
        try:
            yield
        finally:
            _active.reset(token)


def active_capture() -> KeyCapture | None:
    """The capture that is active in this thread, if any."""
    return _active.get()
