"""Choice of the quantiser step of a frame: the step of its rate, or a finer one for text unlike the calibration's.

A step that costs a KL of .016 on text like the calibration's costs more on other text. Other text has more large
coefficients, and the metric, which was fitted to the calibration's text, understates the effect of its errors. Measured
for SmolLM2 with a calibration of English prose and the step of `medium`: KL .014 to .017 on other English, .020 on
program code, .085 on German, .096 on random ids. A frame's error at the rate's step, relative to the calibration's
error in the same period, identifies such text: it is .9 to 1.05 on English and more than 1.25 on the others. With the
error limited to half the calibration's, the KL is .026 on German and .027 to .03 on random ids.
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
# Attempts to find a finer step. The error grows with the square of the step, and more slowly if rows are already zero.
# If so many attempts fail, the KV is too different from the calibration's.
_ATTEMPTS = 6
# Columns at the end are left out while that adds at most this fraction to the error.
_TAIL_SHARE = 0.005


@dataclass(frozen=True, slots=True)
class Target:
    """Step and error limit for the frames of one period."""

    step: float
    error: float
    """mean squared error per value, in the metric, on the calibration's text; infinity switches the guard off"""

    def __post_init__(self) -> None:
        object.__setattr__(self, "step", float(np.float32(self.step)))  # rounded as it is stored


@dataclass(frozen=True, slots=True)
class Rounded:
    """Coefficients divided by the step and rounded."""

    step: float
    integers: torch.Tensor
    """f32 [tokens, columns], without the columns at the end that hardly reduce the error"""


def at_step(found: Coefficients, target: Target, values: int) -> Rounded | None:
    """Rounds with the rate's step. Returns None if the error over the frame's `values` numbers shows that its text is
    unlike the calibration's."""
    return _rounded(found, target.step, GUARD_SLACK * target.error * values if values else 0.0)[0]


def at_finer_step(found: Coefficients, target: Target, values: int) -> Rounded | None:
    """Rounds with a finer step that keeps the error of other text below its limit. None if no step does."""
    limit, lost = GUARD_STRICTNESS * target.error * values, float(found.lost.sum())
    step = target.step
    for _ in range(_ATTEMPTS if lost < limit < math.inf else 0):
        rounded, error = _rounded(found, step, limit)
        if rounded is not None:
            return rounded
        step *= 0.9 * min(1.0, (limit - lost) / max(error - lost, limit)) ** 0.5
        step = float(np.float32(step))
    return None


def _rounded(found: Coefficients, step: float, limit: float) -> tuple[Rounded | None, float]:
    """Rounds with `step` and returns the squared error as well; None in place of the result if the error exceeds
    `limit`. The basis is orthonormal, so the error of the coefficients is the error in the metric."""
    integers = (found.values / step).round_()
    errors = (found.values - integers * step).square().sum(0)
    error = float(found.lost.sum()) + float(errors.sum())
    fits = math.isfinite(error) and (not integers.numel() or float(integers.abs().max()) <= LARGEST_INTEGER)
    if not (fits and error <= limit):
        return None, error
    # Error added by leaving out the last column, the last two, ...
    added = (found.values.square().sum(0) - errors).flip(0).cumsum(0)
    return Rounded(step, integers[:, : int((added > min(_TAIL_SHARE * error, limit - error)).sum())]), error
