"""Workloads unlike any conversation, to see whether a policy was made for one trace."""

from collections.abc import Iterator
from itertools import chain, repeat

import numpy as np

from kvstore_service.bench.trace.trace import Trace

_REFERENCES = 200_000
_BLOCKS = 50_000


def workloads(trace: Trace) -> Iterator[Trace]:
    """Both halves of the trace alone, and made ones: popularity by Zipf's law, the same interrupted by scans of blocks
    that never come again, the same with all popularity dealt anew four times, and a loop."""
    middle = len(trace.requests) // 2
    yield Trace("first half", trace.requests[:middle])
    yield Trace("second half", trace.requests[middle:])
    generator = np.random.default_rng(1)
    for exponent in (0.7, 0.9, 1.1):
        yield _single(f"Zipf {exponent}", _zipf(generator, exponent, _REFERENCES).tolist())
    popular = _zipf(generator, 0.9, _REFERENCES)
    scans = np.arange(_REFERENCES).reshape(10, -1) + _BLOCKS
    yield _single("Zipf 0.9, scans", np.hstack([popular.reshape(10, -1), scans]).ravel().tolist())
    shifted = [generator.permutation(_BLOCKS)[part] for part in np.split(popular, 5)]
    yield _single("Zipf 0.9, shifting", np.concatenate(shifted).tolist())
    yield _single("loop", list(chain.from_iterable(repeat(range(_BLOCKS), _REFERENCES // _BLOCKS))))


def _zipf(
    generator: np.random.Generator, exponent: float, count: int
) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    weights = np.arange(1, _BLOCKS + 1) ** -exponent
    return generator.choice(_BLOCKS, count, p=weights / weights.sum())


def _single(name: str, blocks: list[int]) -> Trace:
    """Prompts of one block."""
    return Trace(name, tuple((block,) for block in blocks))
