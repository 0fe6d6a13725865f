"""A `generate` call whose reusable KV is on its way."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from kvstore_client.buffers import KVBuffers
from kvstore_client.engines.transformers.identity.guard import Described
from kvstore_client.fetch import Fetch
from kvstore_client.match import Match
from kvstore_client.reuse.blend import SegmentFetch, SegmentPlan
from kvstore_client.reuse.generated import Generated
from kvstore_client.timeline import Timeline
from kvstore_codec.model_spec import ModelSpec


@dataclass(slots=True)
class PendingGeneration:
    """A call whose reusable KV is on its way."""

    input_ids: torch.Tensor | None
    arguments: dict[str, Any]
    """Of `generate`."""
    timeline: Timeline
    match: Match = field(default_factory=Match)
    buffers: KVBuffers | None = None
    fetch: Fetch | None = None
    bypassed: str | None = None
    """Why nothing is reused, if the call is not one that can."""
    aborted: Generated | None = None
    """What was computed, if an exception of the engine's ended the call."""
    why_not: str | None = None
    """Why nothing is on its way, if nothing is."""
    segments: SegmentPlan | None = None
    """What is stored of a prompt that was given in segments."""
    coming: SegmentFetch | None = None
    """What of that is on its way."""
    described: Described | None = None
    """What the model was when it was looked up."""
    process: int = field(default_factory=os.getpid)
    """Whose threads bring it."""
    compared: bool = True
    """Whether the model had been compared with its canary. Otherwise nothing was looked up."""
    generation: int = 0
    """Of the model's canary: what its chunks are named with."""
    again: dict[str, Any] = field(default_factory=dict)
    """What the call was asked besides `arguments`."""

    def __post_init__(self) -> None:
        if self.arguments.get("streamer") is not None:
            self.arguments = self.arguments | {"streamer": _PromptOnce(self.arguments["streamer"])}

    @property
    def spec(self) -> ModelSpec:
        """That its chunks are named by. Raises RuntimeError for a call that is passed through."""
        if self.described is None:
            raise RuntimeError("a call that reuses nothing names no chunks")
        return self.described.spec

    @property
    def buffer_bytes(self) -> int:
        """What it holds while its KV is on its way."""
        buffers = self.coming.buffers if self.coming is not None else self.buffers
        return buffers.memory.numel() if buffers is not None else 0

    @property
    def running(self) -> Fetch | None:
        """What brings it."""
        return self.coming.fetch if self.coming is not None else self.fetch

    def on_ready(self, callback: Callable[[], object]) -> None:
        """See `Fetch.on_ready`: `callback` is not for computing."""
        fetch = self.running
        if fetch is None:
            callback()
        else:
            fetch.on_ready(callback)

    def take_back(self) -> tuple[Fetch | None, KVBuffers | None]:
        """What it holds, which it holds no more."""
        held = (self.fetch, self.buffers) if self.coming is None else (self.coming.fetch, self.coming.buffers)
        self.fetch = self.buffers = self.coming = None
        return held if self.process == os.getpid() else (None, None)  # what a parent holds is the parent's

    def next_arguments(self) -> dict[str, Any]:
        """For another pass of the whole prompt."""
        streamer = self.arguments.get("streamer")
        if streamer is not None:
            streamer.expect_prompt()
        return self.arguments


class _PromptOnce:
    """A streamer to which the prompt is announced by the first pass only."""

    def __init__(self, streamer: Any) -> None:
        self._streamer = streamer
        self._announced = False
        self._prompt_comes = True

    def expect_prompt(self) -> None:
        self._prompt_comes = True

    def put(self, value: torch.Tensor) -> None:
        comes, self._prompt_comes = self._prompt_comes, False
        if comes and self._announced:
            return
        self._announced = True
        self._streamer.put(value)

    def end(self) -> None:
        self._streamer.end()
