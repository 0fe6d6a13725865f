"""Which step a frame is rounded with: its rate's, unless its text is unlike the calibration's.

A step that costs the calibration's kind of text a KL of .016 costs others more: they excite more coefficients, and the
metric, learnt from that kind of text, understates what errors do to them. SmolLM2 with a calibration of English prose,
all of it coded with the step of `medium`: KL .014 to .017 on other English, .020 on program code, .085 on German, .096
on random ids. How far a frame's error at the rate's step lies above what the calibration saw in the same period tells
them apart: it is .9 to 1.05 of it on English, more than 1.25 on the others. Held to half the calibration's error
instead, German has .026 and random ids .027 to .03.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from kvstore_codec.klt import Coefficients

# Up to this much more error than the calibration's text has, a frame counts as being like it. One in fifty does more.
GUARD_SLACK = 1.2
# Share of the calibration's error that other frames are held to.
GUARD_STRICTNESS = 0.5
LARGEST_INTEGER = 1 << 23  # exact in f32
# The error grows with the step squared, less where rows are zero already: a few attempts always suffice, or the KV is
# nothing a calibration foresaw.
_ATTEMPTS = 6
# Columns at the end are left out as long as that adds no more than this share to the error.
_TAIL_SHARE = 0.005


@dataclass(frozen=True, slots=True)
class Target:
    """What the frames of one period are to be coded to."""

    step: float
    error: float
    """mean squared error per value in the metric that the calibration's text has; infinity turns the guard off"""

    def __post_init__(self) -> None:
        object.__setattr__(self, "step", float(np.float32(self.step)))  # as it will be read


@dataclass(frozen=True, slots=True)
class Rounded:
    step: float
    integers: torch.Tensor
    """f32 [tokens, columns], without the columns at the end that are not worth coding"""


def at_step(found: Coefficients, target: Target, values: int) -> Rounded | None:
    """Rounded with the rate's step; None if the error over these `values` numbers says that the frame is unlike the
    calibration's text."""
    return _rounded(found, target.step, GUARD_SLACK * target.error * values if values else 0.0)[0]


def at_finer_step(found: Coefficients, target: Target, values: int) -> Rounded | None:
    """Rounded with a step that keeps a frame of other text as faithful; None if none does."""
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
    """None where the squared error, which comes with it, is above `limit`. The basis is orthonormal: errors are what
    they are in its coordinates."""
    integers = (found.values / step).round_()
    errors = (found.values - integers * step).square().sum(0)
    error = float(found.lost.sum()) + float(errors.sum())
    fits = math.isfinite(error) and (not integers.numel() or float(integers.abs().max()) <= LARGEST_INTEGER)
    if not (fits and error <= limit):
        return None, error
    added = (found.values.square().sum(0) - errors).flip(0).cumsum(0)  # by the last column, the last two, ...
    return Rounded(step, integers[:, : int((added > min(_TAIL_SHARE * error, limit - error)).sum())]), error
