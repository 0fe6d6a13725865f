"""The frames of a stored prefix: the unit of scoring, reading and caching (ContiguousKV, arXiv 2601.13631)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

from kvstore_client.match import Match, StoredChunk, Variant
from kvstore_codec.identity import CHUNK_TOKENS


class FrameKey(NamedTuple):
    """Names the exact bytes of a stored frame, in the context and at the position that its `prefix_id` implies."""

    prefix_id: bytes
    encoding: str
    frame: int
    """Number of the frame in its chunk."""
    checksum: int


@dataclass(frozen=True, slots=True)
class FrameGrid:
    """A prefix as `periods` x `frames` stored frames. Frame `index` of every period holds the tokens from
    `index * frame_tokens` on.

    All chunks are in the same encoding geometry, so each period has the same layers throughout the prefix.
    """

    chunks: tuple[StoredChunk, ...]
    variants: tuple[Variant, ...]
    """The encoding that each chunk is read in."""

    @classmethod
    def of(cls, match: Match) -> FrameGrid | None:
        """The grid of a prefix that was found stored. Each chunk is read in its most faithful usable encoding whose
        geometry all chunks have; None when no geometry is common to all, or a frame does not divide a chunk."""
        best: tuple[int, tuple[Variant, ...]] | None = None
        for shape in dict.fromkeys(_shape(v) for chunk in match.chunks for v in chunk.variants):
            chosen = [_first(chunk, shape) for chunk in match.chunks]
            ranks = [rank for rank, _ in filter(None, chosen)]
            if len(ranks) == len(match.chunks) and (best is None or sum(ranks) < best[0]):
                best = sum(ranks), tuple(variant for _, variant in filter(None, chosen))
        return None if best is None else cls(match.chunks, best[1])

    @classmethod
    def each_of(cls, match: Match) -> list[FrameGrid]:
        """The grids of a prefix that was found stored, one for each encoding that all chunks have, the most faithful
        first; where they have none in common, the grid `of` it."""
        offered = [{v.header.encoding.name: v for v in chunk.variants} for chunk in match.chunks]
        found: list[FrameGrid] = []
        for name in offered[0] if offered else ():
            if all(name in variants for variants in offered):
                chunks = tuple(
                    replace(chunk, variants=(variants[name],))
                    for chunk, variants in zip(match.chunks, offered, strict=True)
                )
                grid = cls.of(Match(chunks))
                if grid is not None:
                    found.append(grid)
        mixed = cls.of(match) if not found else None
        return found if mixed is None else [mixed]

    @property
    def frame_tokens(self) -> int:
        return self.variants[0].header.geometry.frame_tokens

    @property
    def frames_per_chunk(self) -> int:
        return self.variants[0].header.geometry.frames_per_period

    @property
    def frames(self) -> int:
        """Number of frames in a period."""
        return len(self.chunks) * self.frames_per_chunk

    @property
    def periods(self) -> int:
        return self.variants[0].header.geometry.periods

    @property
    def tokens(self) -> int:
        return self.frames * self.frame_tokens

    def layers_of(self, period: int) -> range:
        return self.variants[0].header.geometry.layers_of(period)

    def tokens_of(self, index: int) -> slice:
        """Positions of a frame in the prompt."""
        return slice(index * self.frame_tokens, (index + 1) * self.frame_tokens)

    def place_of(self, period: int, index: int) -> tuple[int, int]:
        """The chunk of a frame, and the frame's number in that chunk."""
        chunk, slot = divmod(index, self.frames_per_chunk)
        return chunk, period * self.frames_per_chunk + slot

    def key_of(self, period: int, index: int) -> FrameKey:
        chunk, frame = self.place_of(period, index)
        header = self.variants[chunk].header
        return FrameKey(header.chunk_id.prefix_id, header.encoding.name, frame, header.frame_checksums[frame])

    def size_bytes(self, period: int, indices: Iterable[int]) -> int:
        """Stored size of these frames, bytes."""
        places = (self.place_of(period, index) for index in indices)
        return sum(self.variants[chunk].header.frame_lengths[frame] for chunk, frame in places)


def _shape(variant: Variant) -> tuple[int, int, int]:
    geometry = variant.header.geometry
    return geometry.period_layers, geometry.frame_tokens, geometry.tokens


def _first(chunk: StoredChunk, shape: tuple[int, int, int]) -> tuple[int, Variant] | None:
    """The chunk's first decodable variant of this shape and its rank."""
    _, frame_tokens, tokens = shape
    if tokens != CHUNK_TOKENS or tokens % frame_tokens:
        return None
    for rank, variant in enumerate(chunk.variants):
        if variant.is_decodable and _shape(variant) == shape:
            return rank, variant
    return None
