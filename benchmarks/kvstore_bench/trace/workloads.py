"""Workloads that differ from recorded conversations, to show whether a policy is tuned to one trace."""

from collections.abc import Iterator
from itertools import chain, islice, repeat

import numpy as np

from kvstore_bench.trace.trace import Trace

_REFERENCES = 200_000
_BLOCKS = 50_000


def workloads(trace: Trace) -> Iterator[Trace]:
    """The two halves of the trace, and synthetic workloads: popularity by Zipf's law, the same with scans of blocks
    that are used once, the same with popularity reassigned four times, and a loop."""
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


def texts_beyond_memory() -> Trace:
    """Texts of 60 to 500 blocks, more than a cache of a few percent of all blocks holds, among short ones. Texts are
    chosen by Zipf's law, and often twice in a row. All begin with the same 8 blocks. Half of the prompts follow their
    text up to some point and then end differently."""
    generator = np.random.default_rng(2)
    fresh = iter(range(8, 1 << 40))
    common = tuple(range(8))
    texts = [common + tuple(islice(fresh, int(length))) for length in generator.integers(52, 493, 30)]
    popularity = 1 / np.arange(1, len(texts) + 1)
    popularity /= popularity.sum()
    requests: list[tuple[int, ...]] = []
    while len(requests) < 400:
        if generator.random() < 0.4:
            requests.append(common + tuple(islice(fresh, int(generator.integers(1, 12)))))
            continue
        text = texts[generator.choice(len(texts), p=popularity)]
        if generator.random() < 0.5:
            text = text[: generator.integers(8, len(text))]
            text += tuple(islice(fresh, int(generator.integers(1, 20))))
        requests += [text] * (1 + (generator.random() < 0.5))
    return Trace("texts beyond memory", tuple(requests))


def _zipf(
    generator: np.random.Generator, exponent: float, count: int
) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    weights = np.arange(1, _BLOCKS + 1) ** -exponent
    return generator.choice(_BLOCKS, count, p=weights / weights.sum())


def _single(name: str, blocks: list[int]) -> Trace:
    """A trace of prompts with one block each."""
    return Trace(name, tuple((block,) for block in blocks))
