"""Choice of the quantiser step of a frame: the step of its rate, or a finer one for text unlike the calibration's.

A *calibration* holds what was learnt about one model's KV from sample text: a transform for each *period* (a few
consecutive layers), and a quantiser step for each *rate* (`high`, `medium` or `low`: how faithful the coded KV is). A
*frame* is the KV of 64 tokens in one period. The *metric* weighs an error in KV by its effect on the model, as measured
on the sample text. *KL* is the divergence between the next-token distributions with and without coding, in nats per
token.

A step that costs a KL of .016 on text like the calibration's costs more on other text. Other text has more large
coefficients, and the metric understates the effect of its errors. Measured for SmolLM2 with a calibration of English
prose and the step of `medium`: KL .014 to .017 on other English, .020 on program code, .085 on German, .096 on random
ids. A frame's error at the rate's step, relative to the calibration's error in the same period, identifies such text:
it is .9 to 1.05 on English and more than 1.25 on the others. With the error limited to half the calibration's, the KL
is .026 on German and .027 to .03 on random ids.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from kvstore_codec.klt import Coefficients

# A frame with up to this multiple of the calibration's error counts as similar text. One frame in fifty has more.
GUARD_SLACK = 1.2
# Limit on the error of all other frames, as a fraction of the calibration's error.
GUARD_STRICTNESS = 0.5
LARGEST_INTEGER = 1 << 23  # exact in f32
# Steps that `at_finer_step` tries. The error grows with the square of the step, and more slowly if rows are already
# zero. If so many attempts fail, the KV is too different from the calibration's.
_ATTEMPTS = 6
# Columns at the end are left out while that adds at most this fraction to the error.
_TAIL_SHARE = 0.005


@dataclass(frozen=True, slots=True)
class Target:
    """Step and error limit for the frames of one period."""

    step: float
    error: float
    """mean squared error per value at this step, in the metric, on the calibration's text; infinity: no guard"""

    def __post_init__(self) -> None:
        object.__setattr__(self, "step", float(np.float32(self.step)))  # rounded as it is stored


@dataclass(frozen=True, slots=True)
class Rounded:
    """Coefficients divided by the step and rounded."""

    step: float
    integers: torch.Tensor
    """f32 [tokens, columns], without the columns at the end that hardly reduce the error"""


def at_step(coefficients: Coefficients, target: Target, value_count: int) -> Rounded | None:
    """Rounds with the rate's step. `value_count` is the number of the frame's values that are coded inexactly.

    Returns None if the squared error exceeds GUARD_SLACK times the calibration's, which shows that the text is unlike
    the calibration's, if the error is not finite, or if a rounded coefficient exceeds LARGEST_INTEGER. The caller then
    tries more columns of the transform, and last `at_finer_step`. Without a guard (`target.error` is infinite) any
    finite error is accepted."""
    limit = GUARD_SLACK * target.error * value_count if value_count else 0.0
    return _rounded(coefficients, target.step, limit)[0]


def at_finer_step(coefficients: Coefficients, target: Target, value_count: int) -> Rounded | None:
    """Rounds with a step that keeps the squared error below GUARD_STRICTNESS times the calibration's. Tries
    at most _ATTEMPTS steps, the rate's step first.

    Returns None if no step tried does, if the error that no step reduces (`lost`) exceeds the limit by itself, or if
    there is no guard (`target.error` is infinite). The caller then stores the frame exactly."""
    limit, lost = GUARD_STRICTNESS * target.error * value_count, float(coefficients.lost.sum())
    if not lost < limit < math.inf:
        return None
    step = target.step
    for _ in range(_ATTEMPTS):
        rounded, error = _rounded(coefficients, step, limit)
        if rounded is not None:
            return rounded
        # The rest of the error grows with the square of the step. Aim at 0.9 of the step that meets the limit.
        step *= 0.9 * min(1.0, (limit - lost) / max(error - lost, limit)) ** 0.5
        step = float(np.float32(step))
    return None


def _rounded(coefficients: Coefficients, step: float, limit: float) -> tuple[Rounded | None, float]:
    """Rounds with `step` and returns the squared error as well; None in place of the result if the error exceeds
    `limit` or is not finite, or if a number exceeds LARGEST_INTEGER. The basis is orthonormal, so the error of the
    coefficients is the error in the metric."""
    values = coefficients.values
    integers = (values / step).round_()
    errors = (values - integers * step).square().sum(0)  # by column
    error = float(coefficients.lost.sum()) + float(errors.sum())
    fits = math.isfinite(error) and (not integers.numel() or float(integers.abs().max()) <= LARGEST_INTEGER)
    if not (fits and error <= limit):
        return None, error
    # Error added by leaving out the last column, the last two, ...: it never decreases.
    added = (values.square().sum(0) - errors).flip(0).cumsum(0)
    allowed = min(_TAIL_SHARE * error, limit - error)
    kept = int((added > allowed).sum())
    return Rounded(step, integers[:, :kept]), error
