"""Search for the recompute ratio with the lowest time to first token: Algorithm 1 of CacheTune (arXiv 2605.24022). A
request waits for the slower of computing r*N tokens and fetching the others:

T(r) = max(r * N * compute_s, (1 - r) * N * transfer_s)

T(r) is least where both take equally long. Measurements, not this model, decide.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kvstore_codec.errors import ConfigurationError

LEAST_RATIO = 0.15
"""From the paper: below it the answers suffer."""
TOLERANCE = 0.01

_GOLDEN = (3 - math.sqrt(5)) / 2
"""Golden section: the next measurement divides an interval at this share, 0.38."""


class Measurement(NamedTuple):
    ratio: float
    ttft_s: float


@dataclass(frozen=True, slots=True)
class Tuned:
    """`ratio` is the fastest measured ratio; `measurements` are all measurements, in the order in which they were
    made."""

    ratio: float
    measurements: tuple[Measurement, ...]


def balance(compute_s: float, transfer_s: float) -> float:
    """The ratio, 0 to 1, at which T(r) is least, from the seconds to compute and to fetch a token."""
    both_s = compute_s + transfer_s
    return transfer_s / both_s if both_s > 0 else 0.0


def initial_ratio(
    compute_s: float, transfer_s: float, most: float = 1.0, least: float = LEAST_RATIO
) -> float:
    """First ratio of the search: `balance` within the bounds. Raises ConfigurationError for invalid bounds."""
    require_bounds(least, most)
    return min(max(balance(compute_s, transfer_s), least), most)


def golden_section(
    measure: Callable[[float], float],
    first: float,
    low: float = LEAST_RATIO,
    high: float = 1.0,
    tolerance: float = TOLERANCE,
) -> Tuned:
    """Narrows [low, high] down to `tolerance` around the ratio with the least `measure(ratio)`, a mean TTFT in seconds,
    beginning at `first`. No ratio is measured twice. The lower bound is always measured: with little to compute it is
    the fastest, and a noisy measurement near it would hide that. The upper bound is measured when the search ends
    there.

    Correct where the true curve has one minimum. With noisy measurements the result was never measured slower than
    `first`. Raises ConfigurationError for invalid bounds, or a `first` outside them.
    """
    require_bounds(low, high)
    if not low <= first <= high or not tolerance > 0:
        raise ConfigurationError(
            f"a search between {low} and {high} cannot begin at {first} with a tolerance of {tolerance}"
        )
    measured: dict[float, float] = {}

    def at(ratio: float) -> float:
        if ratio not in measured:
            measured[ratio] = measure(ratio)
        return measured[ratio]

    left, best, right = low, first, high
    at(best)
    while right - left > tolerance:
        if right - best > best - left:
            probe = best + _GOLDEN * (right - best)
            if at(probe) < at(best):
                left, best = best, probe
            else:
                right = probe
        else:
            probe = best - _GOLDEN * (best - left)
            if at(probe) < at(best):
                best, right = probe, best
            else:
                left = probe
    at(low)
    if right == high:
        at(high)
    ratio = min(measured, key=lambda ratio: measured[ratio])
    return Tuned(ratio, tuple(Measurement(*pair) for pair in measured.items()))


class BesideFirst:
    """Mean TTFT of one ratio after another, for `golden_section`. The first ratio is measured again beside each later
    one, so that a machine that slows down during the search does not make later ratios look worse than they are.

    `mean_ttfts_s` measures several ratios in the same rounds.
    """

    def __init__(self, mean_ttfts_s: Callable[[Sequence[float]], Sequence[float]]) -> None:
        self._mean_ttfts_s = mean_ttfts_s
        self._first: Measurement | None = None

    def __call__(self, ratio: float) -> float:
        if self._first is None:
            (found_s,) = self._mean_ttfts_s([ratio])
            self._first = Measurement(ratio, found_s)
            return found_s
        found_s, again_s = self._mean_ttfts_s([ratio, self._first.ratio])
        return found_s * self._first.ttft_s / again_s


def require_bounds(least: float, most: float) -> None:
    """Raises ConfigurationError unless 0 <= least <= most <= 1."""
    if not 0 <= least <= most <= 1:
        raise ConfigurationError(
            f"recompute ratios between {least} and {most} are not possible: 0 <= least <= most <= 1 is required"
        )
