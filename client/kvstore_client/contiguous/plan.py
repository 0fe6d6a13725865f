"""Decides whether a question is computed over a part of its prefix, and over how much of it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from kvstore_client.contiguous.choice import frames_within
from kvstore_client.contiguous.grid import FrameGrid
from kvstore_client.contiguous.summaries import Scorer, SummaryScorer, SummaryShape
from kvstore_client.contiguous.summary_store import SummaryStore
from kvstore_client.match import Match
from kvstore_client.reuse.engine import DecoderLayers
from kvstore_codec.model_spec import ModelSpec


@dataclass(frozen=True, slots=True)
class ReprefillPlan:
    """A question's prefix, and how many of its frames each period reads."""

    grid: FrameGrid
    count: int
    scorer: Scorer | None
    """None when all frames are read."""
    summary_bytes: int
    """Size of the summaries that were read for the scorer."""


def reprefill_plan(
    match: Match,
    prompt_tokens: int,
    budget: float,
    spec: ModelSpec,
    decoder: DecoderLayers,
    summaries: SummaryStore,
) -> ReprefillPlan | None:
    """The plan for a prompt whose stored prefix is `match`. None when the prefix is to be reused in full: its layers
    have sliding windows, its chunks have no common geometry, the rest of the prompt is longer than the prefix (it is
    text to store rather than a question), or there are no summaries yet. May wait for summaries."""
    if has_windows(decoder):
        return None
    if match.tokens >= prompt_tokens:  # the question is at least one token
        match = replace(match, chunks=match.chunks[:-1])
    grid = FrameGrid.of(match) if match.chunks else None
    if grid is None or prompt_tokens - grid.tokens > grid.tokens:
        return None
    count = frames_within(budget, grid.frames)
    if count == grid.frames:
        return ReprefillPlan(grid, count, None, 0)
    shape = SummaryShape.of(grid.variants[0].header.geometry)
    prefix_ids = [chunk.chunk_id.prefix_id for chunk in grid.chunks]
    found = summaries.find(spec, prefix_ids, shape)
    if len(found.summaries) < len(prefix_ids):
        return None
    made = [found.summaries[name] for name in prefix_ids]
    return ReprefillPlan(grid, count, SummaryScorer(made, grid.frame_tokens, shape), found.read_bytes)


def has_windows(decoder: DecoderLayers) -> bool:
    """Whether some layer attends only to the latest tokens: budgets and summaries are not for such models."""
    return any(decoder.window(layer) is not None for layer in range(decoder.layers))
