"""Tunes the recompute ratio for a tier with `kvstore_client.recompute.tuning`, and compares it with a sweep of
ratios."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvstore_bench.recompute.engine import Engine
from kvstore_bench.recompute.methods import Cell, Method
from kvstore_bench.recompute.prompts import Prompt
from kvstore_bench.recompute.times import Race, race
from kvstore_client.recompute.tuning import (
    LEAST_RATIO,
    TOLERANCE,
    BesideFirst,
    golden_section,
    initial_ratio,
)
from kvstore_client.reuse.blend.worth import MOST_COMPUTED

_SWEEP_POINTS, _QUICK_SWEEP_POINTS, _QUICK_TOLERANCE = 10, 2, 0.5
_MEAN_OF = 3


@dataclass(frozen=True, slots=True)
class TunedTier:
    cell: Cell
    first: float
    """Ratio that the search began with, from the times to compute and to fetch a token."""
    measurements: int
    sweep: tuple[Cell, ...]
    race: Race
    """Times of the tuned ratio and of the sweep, in the same rounds."""


def tune(
    engine: Engine,
    prompt: Prompt,
    method: Method,
    repeats: int,
    advance: Callable[[int, int], None],
    *,
    quick: bool,
) -> TunedTier:
    """Searches ratios up to `MOST_COMPUTED`, above which the engine reuses nothing. Then measures a sweep of ten ratios
    over the same range."""
    compute_s = engine.compute(prompt) / prompt.ids.shape[1]
    unchanged = engine.ask(prompt, Cell(method, 0.0).recompute)
    first = initial_ratio(compute_s, unchanged.receive_s / prompt.document_tokens, MOST_COMPUTED)

    def mean_ttfts_s(ratios: Sequence[float]) -> list[float]:
        asked = [Cell(method, ratio).recompute for ratio in ratios]
        rounds = [[engine.ask(prompt, one).ttft_s for one in asked] for _ in range(min(repeats, _MEAN_OF))]
        return [statistics.fmean(of_one) for of_one in zip(*rounds, strict=True)]

    tolerance = _QUICK_TOLERANCE if quick else TOLERANCE
    tuned = golden_section(BesideFirst(mean_ttfts_s), first, high=MOST_COMPUTED, tolerance=tolerance)
    points = _QUICK_SWEEP_POINTS if quick else _SWEEP_POINTS
    step = (MOST_COMPUTED - LEAST_RATIO) / (points - 1)
    sweep = tuple(Cell(method, round(LEAST_RATIO + step * point, 4)) for point in range(points))
    cell = Cell(method, tuned.ratio)
    cells = list(dict.fromkeys([cell, *sweep]))
    raced = race(engine, prompt, cells, repeats, advance)
    return TunedTier(cell, first, len(tuned.measurements), sweep, raced)
