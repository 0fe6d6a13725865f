"""Finds the ratio with the lowest mean TTFT on one tier, by Algorithm 1 of CacheTune (arXiv 2605.24022)."""

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
"""Highest ratio. With a higher one, the engine prefills instead."""
_NARROWING = (math.sqrt(5) - 1) / 2
_MORE = 3
"""Measurements that do not narrow the search: the first ratio, and the two bounds."""

Advance = Callable[[int, int], None]
"""Reports progress of a stage: steps done, and steps in total."""


@dataclass(frozen=True, slots=True)
class TunedTier:
    costs: Costs
    first: float
    """First ratio of the search, at which computing and fetching take equally long."""
    tuned: Tuned
    ttft_s: float
    """Seconds to the first token at the tuned ratio, in the same rounds as the sweep."""
    sweep: tuple[tuple[float, float], ...]
    """Evenly spaced ratios, and their seconds to the first token."""

    @property
    def best(self) -> tuple[float, float] | None:
        """The ratio of the sweep with the fewest seconds; None without a sweep."""
        return min(self.sweep, key=lambda point: point[1], default=None)


def tune(rounds: Rounds, sweep: int, advance: Advance, advance_sweep: Advance) -> TunedTier:
    """Tunes the ratio. `sweep` is the number of additional ratios to measure."""
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
