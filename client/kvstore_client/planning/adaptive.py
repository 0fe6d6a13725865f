"""Adaptive planner: fetches what is faster to fetch and computes what is faster to compute, in parallel.

Computing from one end of the prompt while the other end arrives is the idea of Cake (arXiv 2410.03065). Choosing what
to fetch by the link's last bandwidth and a table of decoding speeds is KVFetcher's (arXiv 2602.09725), which chooses
among resolutions only. Here rate, coder, resolution and the split between fetching and computing are one search over
one time model.

A plan reads the fetched chunks in one of two orders. In the order "layers" the first layers of all chunks are read
first, and the engine follows layer by layer. In the order "back" whole chunks are read, the last one first, while the
engine computes chunks from the front until the two meet.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from kvstore_client.planning.base import COMPUTE, Order, Plan, Work
from kvstore_client.planning.predict import predict
from kvstore_client.planning.space import LOSS, Ends, Floats, Indices, Space

TIE = 1.02
"""Plans within this factor of the least predicted time tie: predictions are not more exact. Among tied plans the most
faithful one wins."""

WORTH_MIXING = 1.3
"""A mix of fetching and computing must be this many times faster than either alone, and two encodings than one. Below
that the unknown decides (other users of the processor, changes of the link, chunks restored in one product), and it
favours the simple plan."""

_SLOWER = 0.75
"""A more faithful plan must also tie when the links have only this share of their expected bandwidth."""

_MIXES = (0.25, 0.5, 0.75)
"""Shares of the first assignment in the mixtures of two neighbouring assignments that the search tries."""

_GRID = 40
"""Number of chunks at each end that are tried one by one. In longer prompts this many places are tried, then those
around the best one."""

_SPLITS = 64
"""Most places, in a block of two kinds of options, that are tried as the end of the first kind."""


class AdaptivePlanner:
    """Minimises the predicted time, with a handicap for mixed plans (WORTH_MIXING). Among tied plans (TIE) it takes the
    most faithful one. Plans in the order "back" only where the engine computes chunks at the front and the order does
    not cost more than the tie. Stateless."""

    def plan(self, work: Work) -> Plan:
        if not work.chunks:
            return predict(work, {}, "layers")
        space = Space(work)
        block = _search(space)
        if block.front:
            # The engine computes towards the arriving chunks: with whole chunks the meeting point may still be moved.
            back = _plan(space, block, "back")
            if back.predicted_s <= block.limit_s:
                return back
        return _plan(space, block, "layers")


@dataclass(frozen=True, slots=True)
class _Block:
    """The fetched chunks: all but `front` and `tail`."""

    front: int
    tail: int
    small: Indices
    """For each chunk, the option with fewer bytes and more decoding."""
    large: Indices
    """For each chunk, the option with more bytes and less decoding. A block that is not a mixture has `large` equal to
    `small`; otherwise some chunks take their `small` option and the others their `large` one."""
    limit_s: float
    """Plans up to this time tie with the fastest."""


def _plan(space: Space, block: _Block, order: Order) -> Plan:
    """Plan the block. Chunks with small options come first: they are decoded while the rest arrives (Johnson's
    rule)."""
    ends = (block.small, block.large) if order == "layers" else (block.large, block.small)
    options = _more_faithful(space, block, _split(space, *ends, block), order)
    choices = {
        chunk.index: int(options[row])
        if space.fetchable[row] and block.front <= row < space.count - block.tail
        else COMPUTE
        for row, chunk in enumerate(space.chunks)
    }
    return predict(space.work, choices, order)


def _search(space: Space) -> _Block:
    """Find the best block, in the order "layers". Tries all ends of the block on a grid, then on finer grids around the
    best ends."""
    # Assignments of options to chunks, from the least decoding to the least receiving. No other assignment needs less
    # of a weighted sum of the two, so only neighbours are worth mixing.
    hull = space.assignments()
    unmixed = [*hull, *space.uniform()]
    pairs = [(options, options) for options in unmixed] + [pair for pair in pairwise(hull) for _ in _MIXES]
    costs = [space.costs(options) for options in unmixed]
    # Costs add up, so the costs of a mixture are a mixture of costs.
    mixed = [
        share * large + (1 - share) * small
        for large, small in pairwise(costs[: len(hull)])
        for share in _MIXES
    ]
    sums = _running_sums(np.stack(costs + mixed))
    mixes = np.arange(len(pairs)) >= len(unmixed)
    fetchable = np.concatenate(([0], np.cumsum(space.fetchable)))
    stride = max(1, -(-space.count // _GRID))
    fronts = _places(0, space.count, stride, space.least_front)
    tails = space.tails or _places(0, space.count, stride, 0)
    while True:
        ends = space.all_ends(fronts, tails)
        fetched = fetchable[space.count - ends.tail] - fetchable[ends.front]
        fetches_a_part = (fetched > 0) & (fetched < fetchable[-1])
        handicap = np.where(mixes[:, None] | fetches_a_part, WORTH_MIXING, 1.0)
        block_costs = sums[:, space.count - ends.tail] - sums[:, ends.front]
        seconds, slower = _finish_s(space, block_costs, ends)
        judged, judged_slower = seconds * handicap, slower * handicap
        quickest = np.argmin(judged)
        limit, limit_slower = TIE * judged.flat[quickest], TIE * judged_slower.flat[quickest]
        tied = np.flatnonzero((judged <= limit) & (judged_slower <= limit_slower))
        best = tied[np.lexsort((judged.flat[tied], block_costs[..., LOSS].flat[tied]))[0]]
        row, place = divmod(int(best), len(ends.front))
        front, tail = int(ends.front[place]), int(ends.tail[place])
        if stride == 1:
            large, small = pairs[row]
            return _Block(front, tail, small, large, float(limit / handicap.flat[best]))
        near, stride = stride, max(1, stride // 8)
        fronts = _places(max(front - near, 0), min(front + near, space.count), stride, front)
        tails = space.tails or _places(max(tail - near, 0), min(tail + near, space.count), stride, tail)


def _finish_s(space: Space, sums: Floats, ends: Ends) -> tuple[Floats, Floats]:
    """Predicted seconds with the expected and with slower links."""
    return space.finish_s(sums, ends, "layers"), space.finish_s(sums, ends, "layers", link_share=_SLOWER)


def _places(first: int, last: int, stride: int, included: int) -> list[int]:
    """Every `stride`-th place from `first` on, `last`, and the place `included`, which is between them and known to be
    possible."""
    return sorted({*range(first, last + 1, stride), last, included})


def _running_sums(costs: Floats) -> Floats:
    """`[..., chunks, costs]` -> `[..., chunks + 1, costs]`."""
    sums = np.zeros((*costs.shape[:-2], costs.shape[-2] + 1, costs.shape[-1]))
    np.cumsum(costs, axis=-2, out=sums[..., 1:, :])
    return sums


def _split(space: Space, leading: Indices, trailing: Indices, block: _Block) -> Indices:
    """Options of the block with the first chunks as in `leading` and the rest as in `trailing`, split where it is
    fastest."""
    splits, seconds, _ = _split_seconds(space, leading, trailing, block)
    return np.where(np.arange(space.count) < splits[np.argmin(seconds)], leading, trailing)


def _split_seconds(
    space: Space, leading: Indices, trailing: Indices, block: _Block
) -> tuple[Indices, Floats, Floats]:
    """Places to split the block, and the predicted seconds of each with the expected and with slower links. Chunks
    before the place are as in `leading`, and the rest as in `trailing`."""
    front, end = block.front, space.count - block.tail
    splits = np.unique(np.linspace(front, end, min(_SPLITS, end - front) + 1).astype(np.intp))
    before, after = _running_sums(space.costs(leading)), _running_sums(space.costs(trailing))
    sums = before[splits] - before[front] + after[end] - after[splits]
    ends = Ends(np.full_like(splits, front), np.full_like(splits, block.tail))
    return splits, *_finish_s(space, sums, ends)


def _more_faithful(space: Space, block: _Block, options: Indices, order: Order) -> Indices:
    """Replace options by more faithful ones, for as many chunks as possible while the plan still ties with the fastest
    (TIE, also with slower links). The chunks that arrive last are replaced first. If the block is not a mixture, either
    all of its chunks are replaced or none."""
    rows = np.arange(space.count)
    seconds = np.maximum(space.receive, space.decode)
    mixes = not np.array_equal(block.small, block.large)
    for loss in np.unique(space.loss):
        offered = np.where(space.loss <= loss, seconds, np.inf)
        better = np.where(np.isfinite(offered).any(axis=1), np.argmin(offered, axis=1), options)
        better = np.where(space.loss[rows, better] < space.loss[rows, options], better, options)
        if order == "layers":
            splits, finish_s, slower_s = _split_seconds(space, options, better, block)
            ties = (finish_s <= block.limit_s) & (slower_s <= TIE * slower_s[-1])
            ties[1:] &= mixes
            split = splits[ties].min(initial=space.count)
            options = np.where(rows < split, options, better)
        else:
            splits, finish_s, slower_s = _split_seconds(space, better, options, block)
            ties = (finish_s <= block.limit_s) & (slower_s <= TIE * slower_s[0])
            ties[:-1] &= mixes
            split = splits[ties].max(initial=0)
            options = np.where(rows < split, better, options)
    return options
