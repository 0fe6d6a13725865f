"""The ratio with the least mean TTFT on one tier: Algorithm 1 of CacheTune (arXiv 2605.24022)."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from kvstore_bench.tuning.rounds import Costs, Rounds
from kvstore_client.recompute.tuning import (
    LEAST_RATIO,
    TOLERANCE,
    BesideFirst,
    Tuned,
    golden_section,
    initial_ratio,
)
from kvstore_client.reuse.blend.worth import MOST_COMPUTED

MOST_RATIO = MOST_COMPUTED
"""With more than that to compute, the engine prefills."""
_NARROWING = (math.sqrt(5) - 1) / 2
_MORE = 3
"""Measurements besides those that narrow the search: the first, and the bounds."""

Advance = Callable[[int, int], None]
"""How far a stage is: done, of so many."""


@dataclass(frozen=True, slots=True)
class TunedTier:
    costs: Costs
    first: float
    """Where the search began: in the balance of computing and fetching."""
    tuned: Tuned
    ttft_s: float
    """At the tuned ratio, in the same rounds as the sweep."""
    sweep: tuple[tuple[float, float], ...]
    """Ratios evenly spaced, and their seconds to the first token."""

    @property
    def best(self) -> tuple[float, float] | None:
        """Of the sweep, the ratio with the least seconds; None without one."""
        return min(self.sweep, key=lambda point: point[1], default=None)


def tune(rounds: Rounds, sweep: int, advance: Advance, advance_sweep: Advance) -> TunedTier:
    """`sweep`: so many ratios are measured besides."""
    most = _MORE + math.ceil(math.log(TOLERANCE / (MOST_RATIO - LEAST_RATIO), _NARROWING))
    advance(0, most)
    rounds.warm_up()
    costs = rounds.costs()
    first = initial_ratio(costs.compute_s, costs.transfer_s, MOST_RATIO)
    done, beside_first = 0, BesideFirst(rounds.mean_ttfts_s)

    def measure(ratio: float) -> float:
        nonlocal done
        found_s, done = beside_first(ratio), done + 1
        advance(done, max(done, most))
        return found_s

    tuned = golden_section(measure, first, high=MOST_RATIO)
    advance(done, done)
    points = [LEAST_RATIO + (MOST_RATIO - LEAST_RATIO) * i / max(1, sweep - 1) for i in range(sweep)]
    advance_sweep(0, 1)
    ttft_s, *swept = rounds.mean_ttfts_s([tuned.ratio, *points])
    advance_sweep(1, 1)
    return TunedTier(costs, first, tuned, ttft_s, tuple(zip(points, swept, strict=True)))
