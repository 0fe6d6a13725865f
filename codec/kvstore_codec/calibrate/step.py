"""Search for the quantiser step that gives a required fidelity."""

import math
from collections.abc import Callable

from kvstore_codec.errors import CalibrationError

_SMALLEST_KL = 1e-12
_LARGEST_MOVE = 4.0


def find_step(
    measure: Callable[[float], float],
    target: float,
    *,
    start: float,
    largest: float,
    tolerance: float = 0.03,
    evaluations: int = 8,
) -> float:
    """A step at which `measure` (a KL that grows with the step) is within `tolerance` of `target`, or the closest of
    `evaluations` tries.

    Interpolates log KL over log step, first with its small-step slope of 2, then between the closest tries on both
    sides. Returns `largest`, at which nothing is left to code, if even that step keeps the KL below the target.

    Raises CalibrationError if the measure is not finite.
    """
    if not (0 < start <= largest < math.inf and target > 0):
        raise CalibrationError(f"cannot search for a step from {start} up to {largest} for a KL of {target}")
    below: tuple[float, float] | None = None  # log step, log (KL / target)
    above: tuple[float, float] | None = None
    step, best = start, (math.inf, start)
    for _ in range(evaluations):
        kl = measure(step)
        if not math.isfinite(kl):
            raise CalibrationError(f"the model returns NaN or infinity at a step of {step:g}")
        miss = math.log(max(kl, _SMALLEST_KL) / target)
        best = min(best, (abs(miss), step))
        if abs(miss) <= math.log1p(tolerance) or (miss < 0 and step >= largest):
            return step
        if miss < 0:
            below = (math.log(step), miss)
        else:
            above = (math.log(step), miss)
        step = min(_next(below, above), largest)
    return best[1]


def _next(below: tuple[float, float] | None, above: tuple[float, float] | None) -> float:
    if below is not None and above is not None:
        share = -below[1] / (above[1] - below[1])
        return math.exp(below[0] + min(max(share, 0.1), 0.9) * (above[0] - below[0]))
    known = below or above
    assert known is not None  # noqa: S101  # one of the two has just been measured
    move = min(max(-known[1] / 2, -math.log(_LARGEST_MOVE)), math.log(_LARGEST_MOVE))
    return math.exp(known[0] + move)
