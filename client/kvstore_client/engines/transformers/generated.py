"""One `generate` call, from what was looked up for it to the chunks that it leaves to be stored."""

import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from kvstore_client.buffers import KVBuffers
from kvstore_client.engines.transformers.capture import KeyCapture
from kvstore_client.engines.transformers.features import embedded
from kvstore_client.fetch import Fetch, FetchReport
from kvstore_client.lookup import Match
from kvstore_client.store import NewChunk
from kvstore_client.timeline import Timeline
from kvstore_codec.calibration import token_features
from kvstore_codec.identity import CHUNK_TOKENS, ChunkId
from kvstore_codec.model_spec import ModelSpec

if TYPE_CHECKING:
    from kvstore_client.engines.transformers.blend import SegmentFetch, SegmentPlan
    from kvstore_client.engines.transformers.identity.guard import Described


@dataclass(slots=True)
class Begun:
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
    aborted: "Generated | None" = None
    """What was computed, if an exception of the engine's ended the call."""
    why_not: str | None = None
    """Why nothing is on its way, if nothing is."""
    segments: "SegmentPlan | None" = None
    """What is stored of a prompt that was given in segments."""
    coming: "SegmentFetch | None" = None
    """What of that is on its way."""
    described: "Described | None" = None
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

    def take_back(self) -> "tuple[Fetch | None, KVBuffers | None]":
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


@dataclass(frozen=True, slots=True)
class ComputedRun:
    """Chunks that the engine computed before its last pass."""

    chunks: range
    capture: KeyCapture
    values: torch.Tensor | None = None
    """`[layers, kv_heads, tokens, head_dim]`, of these chunks alone."""

    def keep(self, buffers: KVBuffers) -> "ComputedRun":
        """With values of its own: the buffers are given back."""
        tokens = slice(self.chunks.start * CHUNK_TOKENS, self.chunks.stop * CHUNK_TOKENS)
        return ComputedRun(self.chunks, self.capture, buffers.values[:, :, tokens].clone())


@dataclass(frozen=True, slots=True)
class Generated:
    """How a call ended."""

    output: Any
    tokens: int
    """That passed through the model, the reused ones counted: the KV of so many is there."""
    values: tuple[torch.Tensor, ...]
    """What the last pass computed, by layer `[kv_heads, tokens, head_dim]`; empty where nothing is to be stored."""
    capture: KeyCapture
    """Of the last pass: its keys."""
    report: FetchReport | None = None
    missing: Sequence[ComputedRun] = ()
    """Computed because something of them had been missing."""
    computed_chunks: int = 0
    """All that were computed before the last pass."""

    def behind(self, report: FetchReport, runs: Sequence[ComputedRun], buffers: KVBuffers) -> "Generated":
        """With how the fetch ended, and the `runs` that were computed into its buffers before the last pass."""
        missing = [run.keep(buffers) for run in runs if not report.missing.keys().isdisjoint(run.chunks)]
        return replace(
            self, report=report, missing=missing, computed_chunks=sum(len(run.chunks) for run in runs)
        )

    @property
    def reused_tokens(self) -> int:
        return self.capture.first_token - self.computed_chunks * CHUNK_TOKENS


def why_not(begun: Begun, reused_tokens: int, report: FetchReport | None) -> str | None:
    """Why nothing of a prompt was reused; None when something was."""
    if reused_tokens:
        return None
    if report is not None and report.missing:
        reasons = Counter(report.missing.values()).most_common()
        return "not fetched: " + ", ".join(f"{reason} ({chunks} chunks)" for reason, chunks in reasons)
    if report is not None:
        return "slower: computing is sooner than fetching"
    return begun.why_not


def new_chunks(
    model: PreTrainedModel,
    tokens: Sequence[int],
    ids: Sequence[ChunkId],
    stored: Collection[int],
    generated: Generated,
    *,
    features: bool,
) -> list[NewChunk]:
    """The full chunks that were computed and are not `stored`, by index, in prompt order."""
    return [
        NewChunk(
            ids[index],
            gather,
            features_of(model, tokens, index * CHUNK_TOKENS) if features else None,
            begins_text=index == 0,
        )
        for index, gather in sorted(_gathers(len(ids), stored, generated), key=lambda pair: pair[0])
    ]


def _gathers(chunks: int, stored: Collection[int], generated: Generated) -> Iterator[tuple[int, "Gather"]]:
    for run in generated.missing:
        if run.values is not None:
            for index in run.chunks:
                if index not in stored:
                    begin = run.chunks.start * CHUNK_TOKENS
                    yield index, Gather(run.capture, tuple(run.values), index * CHUNK_TOKENS, begin)
    new = [i for i in range(-(-generated.capture.first_token // CHUNK_TOKENS), chunks) if i not in stored]
    if not new:
        return
    # Waiting chunks must not keep a long reused prefix alive.
    begin = new[0] * CHUNK_TOKENS
    values = tuple(tensor[:, begin - generated.capture.first_token :] for tensor in generated.values)
    if any(2 * tensor.nbytes < tensor.untyped_storage().nbytes() for tensor in values):
        values = tuple(tensor.clone() for tensor in values)
    for index in new:
        yield index, Gather(generated.capture, values, index * CHUNK_TOKENS, begin)


def features_of(model: PreTrainedModel, tokens: Sequence[int], begin: int) -> partial[torch.Tensor]:
    """Of the chunk at position `begin`. Looked up now: the weights may have changed when its turn has come."""
    return partial(
        token_features, embedded(model, torch.tensor(tokens[begin : begin + CHUNK_TOKENS], device="cpu"))
    )


@dataclass(frozen=True, slots=True)
class Gather:
    """Brings one chunk of computed KV together, when its turn to be stored has come."""

    capture: KeyCapture
    values: tuple[torch.Tensor, ...]
    """Per layer `[kv_heads, tokens, head_dim]`, from position `values_begin` on."""
    begin: int
    values_begin: int

    def __call__(self) -> tuple[torch.Tensor, torch.Tensor]:
        end = self.begin + CHUNK_TOKENS
        keys = torch.stack([self.capture.keys(i, self.begin, end) for i in range(len(self.values))])
        span = slice(self.begin - self.values_begin, end - self.values_begin)
        return keys, torch.stack([values[:, span] for values in self.values])


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
