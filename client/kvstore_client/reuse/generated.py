"""Result of a `generate` call, and the new chunks to store from it."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from kvstore_client.buffers import KVBuffers
from kvstore_client.fetch import FetchReport
from kvstore_client.new_chunk import NewChunk
from kvstore_client.reuse.capture import KeyCapture
from kvstore_client.reuse.engine import TokenEmbeddings
from kvstore_client.reuse.features import features_of
from kvstore_codec.identity import CHUNK_TOKENS, ChunkId


@dataclass(frozen=True, slots=True)
class ComputedRun:
    """Chunks that the engine computed before its last pass."""

    chunks: range
    capture: KeyCapture
    values: torch.Tensor | None = None
    """`[layers, kv_heads, tokens, head_dim]`, of these chunks only."""

    def keep(self, buffers: KVBuffers) -> "ComputedRun":
        """A copy with its own values, valid after the buffers are released."""
        tokens = slice(self.chunks.start * CHUNK_TOKENS, self.chunks.stop * CHUNK_TOKENS)
        return ComputedRun(self.chunks, self.capture, buffers.values[:, :, tokens].clone())


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """Result of a call."""

    output: Any
    sequence: torch.Tensor
    """Tokens of the prompt followed by the generated ones, i64 `[tokens]`."""
    tokens: int
    """Number of tokens whose KV exists, including the reused ones."""
    values: tuple[torch.Tensor, ...]
    """Values of the last pass, by layer `[kv_heads, tokens, head_dim]`; empty where nothing is to be stored."""
    capture: KeyCapture
    """Keys of the last pass."""
    report: FetchReport | None = None
    missing: Sequence[ComputedRun] = ()
    """Runs that were computed because some of their chunks were missing."""
    computed_chunks: int = 0
    """Number of chunks computed before the last pass."""

    def behind(
        self, report: FetchReport, runs: Sequence[ComputedRun], buffers: KVBuffers
    ) -> "GenerationResult":
        """Add the fetch's report, and the `runs` that were computed into its buffers before the last pass."""
        missing = [run.keep(buffers) for run in runs if not report.missing.keys().isdisjoint(run.chunks)]
        return replace(
            self, report=report, missing=missing, computed_chunks=sum(len(run.chunks) for run in runs)
        )

    @property
    def reused_tokens(self) -> int:
        return self.capture.first_token - self.computed_chunks * CHUNK_TOKENS


def new_chunks(
    embed: TokenEmbeddings,
    tokens: Sequence[int],
    ids: Sequence[ChunkId],
    stored: Collection[int],
    generated: GenerationResult,
    *,
    features: bool,
) -> list[NewChunk]:
    """The full chunks that were computed and whose index is not in `stored`, in prompt order."""
    return [
        NewChunk(
            ids[index],
            gather,
            features_of(embed, tokens, index * CHUNK_TOKENS) if features else None,
            begins_text=index == 0,
        )
        for index, gather in sorted(_gathers(len(ids), stored, generated), key=lambda pair: pair[0])
    ]


def _gathers(
    chunks: int, stored: Collection[int], generated: GenerationResult
) -> Iterator[tuple[int, "Gather"]]:
    for run in generated.missing:
        if run.values is not None:
            for index in run.chunks:
                if index not in stored:
                    begin = run.chunks.start * CHUNK_TOKENS
                    yield index, Gather(run.capture, tuple(run.values), index * CHUNK_TOKENS, begin)
    new = [i for i in range(-(-generated.capture.first_token // CHUNK_TOKENS), chunks) if i not in stored]
    if not new:
        return
    # Chunks that wait to be stored must not keep a long reused prefix in memory.
    begin = new[0] * CHUNK_TOKENS
    values = tuple(tensor[:, begin - generated.capture.first_token :] for tensor in generated.values)
    if any(2 * tensor.nbytes < tensor.untyped_storage().nbytes() for tensor in values):
        values = tuple(tensor.clone() for tensor in values)
    for index in new:
        yield index, Gather(generated.capture, values, index * CHUNK_TOKENS, begin)


@dataclass(frozen=True, slots=True)
class Gather:
    """Assembles one chunk of computed KV when the chunk is about to be stored."""

    capture: KeyCapture
    values: tuple[torch.Tensor, ...]
    """By layer, `[kv_heads, tokens, head_dim]`, from position `values_begin` on."""
    begin: int
    values_begin: int

    def __call__(self) -> tuple[torch.Tensor, torch.Tensor]:
        end = self.begin + CHUNK_TOKENS
        keys = torch.stack([self.capture.keys(i, self.begin, end) for i in range(len(self.values))])
        span = slice(self.begin - self.values_begin, end - self.values_begin)
        return keys, torch.stack([values[:, span] for values in self.values])
