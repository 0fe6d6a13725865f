"""Decides whether a question is computed over a part of its prefix, and over how much of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from kvstore_client.client import KVStoreClient
from kvstore_client.contiguous.choice import frames_within
from kvstore_client.contiguous.grid import FrameGrid
from kvstore_client.contiguous.quickest import QuickestChoice
from kvstore_client.contiguous.scoring import Scorer, SummaryScorer
from kvstore_client.contiguous.summaries import SummaryShape
from kvstore_client.match import Match
from kvstore_client.planning import Costs
from kvstore_client.planning.losses import LossTable
from kvstore_client.reuse.engine import DecoderLayers
from kvstore_client.settings import AUTO, Budget
from kvstore_codec.identity import PrefixId
from kvstore_codec.model_spec import ModelSpec


@dataclass(frozen=True, slots=True)
class ReprefillPlan:
    """A question's prefix, and how many of its frames each period reads."""

    grid: FrameGrid
    count: int
    budget: float
    """Share of the prefix's tokens that was asked for, or chosen."""
    scorer: Scorer | None
    """None when all frames are read."""
    summary_bytes: int
    """Size of the summaries that were read for the scorer."""


def reprefill_plan(
    match: Match,
    prompt_tokens: int,
    budget: Budget,
    spec: ModelSpec,
    decoder: DecoderLayers,
    client: KVStoreClient,
    costs: Costs | None,
) -> ReprefillPlan | None:
    """The plan for a prompt whose stored prefix is `match`. None when the prefix is to be reused in full: its layers
    have sliding windows, its chunks have no common geometry, the rest of the prompt is longer than the prefix (it is
    text to store rather than a question), there are no summaries yet, or the whole prefix is what a budget of `auto`
    chooses. May wait for summaries."""
    if has_windows(decoder):
        return None
    if match.tokens >= prompt_tokens:  # the question is at least one token
        match = replace(match, chunks=match.chunks[:-1])
    grids = FrameGrid.each_of(match)
    question_tokens = prompt_tokens - match.tokens
    if not grids or question_tokens > match.tokens:
        return None
    prefix_ids = [chunk.chunk_id.prefix_id for chunk in match.chunks]
    quickest = None if costs is None else QuickestChoice(costs, client.links)
    if budget == AUTO:
        chosen = _within_floor(match, grids, question_tokens, prefix_ids, spec, client, quickest)
        if chosen is None:
            return None
        grid, budget = chosen
    else:
        grid = grids[0] if quickest is None else quickest.of_share(grids, budget, question_tokens)
    count = frames_within(budget, grid.frames)
    if count == grid.frames:
        return ReprefillPlan(grid, count, budget, None, 0)
    shape = SummaryShape.of(grid.variants[0].header.geometry)
    found = client.summaries.find(spec, prefix_ids, shape)
    if len(found.summaries) < len(prefix_ids):
        return None
    scorer = SummaryScorer(client.summaries.joined(prefix_ids, found, shape), grid.frame_tokens)
    return ReprefillPlan(grid, count, budget, scorer, found.read_bytes)


def has_windows(decoder: DecoderLayers) -> bool:
    """Whether some layer attends only to the latest tokens: budgets and summaries are not for such models."""
    return any(decoder.window(layer) is not None for layer in range(decoder.layers))


def _within_floor(
    match: Match,
    grids: Sequence[FrameGrid],
    question_tokens: int,
    prefix_ids: Sequence[PrefixId],
    spec: ModelSpec,
    client: KVStoreClient,
    quickest: QuickestChoice | None,
) -> tuple[FrameGrid, float] | None:
    """The grid and the budget that are quickest within the settings' floor; None: the whole prefix, which is
    also what is chosen when nothing can be predicted."""
    limit = client.settings.encodings.loss
    if quickest is None or not limit:  # a part is never exact, whatever was measured
        return None
    losses = LossTable(client.settings.cache_dir).load(spec.weights_digest)
    shape = SummaryShape.of(grids[0].variants[0].header.geometry)
    unread = len(prefix_ids) - len(client.summaries.known(prefix_ids, shape).summaries)
    choice = quickest.within(grids, match, question_tokens, losses, limit, unread * shape.size_bytes)
    return None if choice.grid is None else (choice.grid, choice.budget)
