"""Plan for a segmented prompt: which chunks are reused."""

import operator
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from kvstore_client.match import Match, StoredChunk
from kvstore_client.recompute import Recompute, ReusedChunk
from kvstore_codec.identity import CHUNK_TOKENS, PlacedChunk, begins_text


@dataclass(frozen=True, slots=True)
class SegmentPlan:
    """Plan of one prompt."""

    placed: tuple[PlacedChunk, ...]
    """Full chunks of all segments but the question."""
    question: int
    """Position of the question's first token."""
    recompute: Recompute
    documents: tuple[int, ...] = ()
    """Position at which each segment begins."""
    match: Match = field(default_factory=Match)
    """Chunks to reuse."""
    stored: frozenset[int] = frozenset()
    """First tokens of the chunks that are stored, in any context."""
    prefill_s: float | None = None
    """Predicted duration of a prefill of the whole prompt, seconds; None where it is not known."""

    @property
    def unstored(self) -> list[PlacedChunk]:
        return [chunk for chunk in self.placed if chunk.first_token not in self.stored]

    @property
    def chunks(self) -> list[ReusedChunk]:
        return [reused_chunk(chunk, self.document(chunk.first_token)) for chunk in self.match.chunks]

    def document(self, position: int) -> int:
        """Number of the segment that contains a token, counted from 1."""
        return bisect_right(self.documents, position)


def without_false_beginning(match: Match) -> Match:
    """Drop a first chunk that comes from the middle of a text. A text's first tokens are attention sinks; such a chunk
    has none, and nothing repairs a prompt that begins with it (measured: KL 0.49, and 0.006 where the chunk is
    computed)."""
    return replace(match, chunks=tuple(c for c in match.chunks if c.exact or c.first_token))


def exact_beginning(match: Match) -> Match:
    """The contiguous exact chunks from the prompt's first token on."""
    chunks: list[StoredChunk] = []
    for chunk in match.chunks:
        if not chunk.exact or chunk.first_token != len(chunks) * CHUNK_TOKENS:
            break
        chunks.append(chunk)
    return replace(match, chunks=tuple(chunks))


def chunk_tokens(chunk: PlacedChunk) -> range:
    """Positions of the chunk in the prompt."""
    return range(chunk.first_token, chunk.first_token + CHUNK_TOKENS)


def documents_of(
    placed: Sequence[PlacedChunk], segments: Sequence[int]
) -> tuple[tuple[PlacedChunk, ...], int]:
    """The chunks that may be reused, and the position of the question: the last segment, or the last token if that is
    empty, because the last token always passes through the model."""
    lengths = [operator.index(length) for length in segments]
    total = sum(lengths)
    question = min(total - lengths[-1], total - 1)
    return tuple(chunk for chunk in placed if chunk.first_token + CHUNK_TOKENS <= question), question


def reused_chunk(stored: StoredChunk, document: int | None = None) -> ReusedChunk:
    first = stored.first_token
    return ReusedChunk(
        range(first, first + stored.header.geometry.tokens),
        exact=stored.exact,
        begins_text=begins_text(stored.chunk_id),
        order=stored.header.token_order,
        content_id=stored.chunk_id.content_id,
        document=document,
    )


def skipped(selected: torch.Tensor) -> list[range]:
    """Runs of contiguous positions, which are computed and need not be fetched."""
    if not len(selected):
        return []
    breaks = (selected.diff() != 1).nonzero().flatten() + 1
    return [range(int(run[0]), int(run[-1]) + 1) for run in selected.tensor_split(breaks)]
