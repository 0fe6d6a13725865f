"""Fits the cost of forward passes to timed ones."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvstore_client.planning.profile import PrefillCost

_FIXED, _TOKEN, _PAIR = range(3)
_TERMS = (
    (_TOKEN,),
    (_TOKEN, _PAIR),
    (_FIXED, _TOKEN),
    (_FIXED, _TOKEN, _PAIR),
    (_PAIR,),
    (_FIXED,),
    (_FIXED, _PAIR),
)
"""Terms of the cost that may be positive, in the order in which those that fit equally well are preferred."""

_EQUAL = 1e-6
"""Mean square errors this close are equal. Without it rounding would choose among passes that are all alike, which
every single term fits."""


@dataclass(frozen=True, slots=True)
class TimedPass:
    """A forward pass that took `seconds`."""

    tokens: int
    pairs: float
    """Sum over its tokens of the number of tokens before each."""
    seconds: float


def fit(
    passes: Sequence[TimedPass], weights: Sequence[float] | None = None, term_error: float = 0.0
) -> PrefillCost:
    """Fit the three costs, none negative, with the least mean square relative error, each pass with its weight. A
    further term must lower that error by `term_error`: passes that are much alike do not tell the terms apart."""
    rows = np.array([(1.0, one.tokens, one.pairs) for one in passes])
    weighted = rows / np.array([[one.seconds] for one in passes])
    weight = np.ones(len(passes)) if weights is None else np.asarray(weights, np.float64)
    root = np.sqrt(weight / weight.sum())
    best, least = np.zeros(3), np.inf
    for terms in _TERMS:
        costs = np.zeros(3)
        costs[list(terms)] = np.linalg.lstsq(weighted[:, terms] * root[:, None], root, rcond=None)[0]
        error = float((weight * np.square(weighted @ costs - 1)).sum() / weight.sum()) + term_error * len(
            terms
        )
        if costs.min() >= 0 and error < least - _EQUAL:
            best, least = costs, error
    return PrefillCost(*(float(cost) for cost in best))
