"""Search space of plans, as arrays: a plan's demand on each stage is the difference of two running sums."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvstore_client.planning.base import Order, Work
from kvstore_client.planning.predict import PASS_TOKENS, Load, bandwidth_of, finish_s
from kvstore_codec.encoding import Encoding

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.intp]

# The last 4 columns of a cost; before them there is one column for each endpoint's link.
WORK, HOLES, FETCHED, LOSS = -4, -3, -2, -1


@dataclass(frozen=True, slots=True)
class Ends:
    """Number of chunks computed at the front and at the end of the match: arrays of one shape."""

    front: Indices
    tail: Indices


class Space:
    """All plans that fetch one block of chunks and compute the chunks before and behind it.

    A *cost* is what one chunk adds to the stages: seconds of each endpoint's link, of the decoding threads (WORK), of
    forward passes in the middle for chunks that cannot be fetched (HOLES), then 1 if it is fetched (FETCHED), then its
    LOSS: tokens * number of more faithful rates. Costs add up, so `[..., costs]` arrays of sums describe whole plans.
    """

    def __init__(self, work: Work) -> None:
        self.work = work
        self.chunks = work.chunks
        self.count = len(work.chunks)
        self._endpoints = sorted({chunk.endpoint for chunk in work.chunks})
        self._latencies = np.array([work.latencies_s.get(name, 0.0) for name in self._endpoints])
        self.link = np.array([self._endpoints.index(chunk.endpoint) for chunk in work.chunks], np.intp)
        most = max((len(chunk.options) for chunk in work.chunks), default=0)
        self.receive = np.full((self.count, max(most, 1)), np.inf)
        self.decode = np.full_like(self.receive, np.inf)
        self.loss = np.zeros_like(self.receive)
        bandwidths = [bandwidth_of(work, name) for name in self._endpoints]
        losses: dict[tuple[str, ...], list[int]] = {}
        alike: dict[tuple[str, ...], list[int]] = {}
        for row, chunk in enumerate(work.chunks):
            bandwidth = bandwidths[self.link[row]]
            names = tuple(option.encoding for option in chunk.options)
            if names not in losses:
                losses[names] = _losses(names)
            alike.setdefault(names, []).append(row)
            for column, option in enumerate(chunk.options):
                self.receive[row, column] = option.size_bytes / bandwidth
                self.decode[row, column] = option.work_s / work.decode_threads
                self.loss[row, column] = chunk.tokens * losses[names][column]
        self._alike = {offer: np.array(rows, np.intp) for offer, rows in alike.items()}
        self.fetchable = np.isfinite(self.receive).any(axis=1)
        self._holes = self._hole_seconds()
        self._front, self._tail = self._front_seconds(), self._tail_seconds()

    @property
    def least_front(self) -> int:
        """Number of unfetchable chunks at the front, which must be computed."""
        return int(np.isfinite(self._front).argmax())

    @property
    def tails(self) -> list[int] | None:
        """Possible numbers of chunks computed at the end; None: all."""
        if not self.work.fixed_end:
            return None
        fetchable = np.flatnonzero(self.fetchable)
        return [0] if not len(fetchable) else sorted({0, self.count - 1 - int(fetchable[-1])})

    def assignments(self) -> list[Indices]:
        """Options of all chunks, along the lower hull from the least decoding to the least receiving. Neighbours in
        this list may be mixed."""
        found: list[Indices] = []
        for weight in (0.0, *(1 / (1 + 4.0**power) for power in range(3, -4, -1)), 1.0):
            options = np.argmin(_weighted(self.receive, weight) + _weighted(self.decode, 1 - weight), axis=1)
            if not found or not np.array_equal(options, found[-1]):
                found.append(options)
        return found

    def uniform(self) -> list[Indices]:
        """For every encoding: all chunks in that encoding, or in their fastest one where they do not have it."""
        quickest = np.argmin(np.maximum(self.receive, self.decode), axis=1)
        found: list[Indices] = []
        for name in dict.fromkeys(name for names in self._alike for name in names):
            options = quickest.copy()
            for names, rows in self._alike.items():
                if name in names:
                    options[rows] = names.index(name)
            found.append(options)
        return found

    def costs(self, options: Indices) -> Floats:
        """`[chunks, costs]` of these options."""
        rows = np.arange(self.count)
        costs = np.zeros((self.count, len(self._endpoints) + 4))
        fetched = self.fetchable
        costs[rows[fetched], self.link[fetched]] = self.receive[rows, options][fetched]
        costs[fetched, WORK] = self.decode[rows, options][fetched]
        costs[:, HOLES] = self._holes
        costs[fetched, FETCHED] = 1.0
        costs[fetched, LOSS] = self.loss[rows, options][fetched]
        return costs

    def all_ends(self, front: Sequence[int], tail: Sequence[int]) -> Ends:
        """Possible combinations of `front` x `tail`: chunks that cannot be computed are between them, and chunks that
        cannot be fetched are not at the block's edge."""
        fronts, tails = np.meshgrid(np.asarray(front, np.intp), np.asarray(tail, np.intp), indexing="ij")
        fits = fronts + tails <= self.count
        fits &= np.isfinite(self._front[np.clip(fronts, 0, self.count)])
        fits &= np.isfinite(self._tail[np.clip(tails, 0, self.count)])
        return Ends(fronts[fits], tails[fits])

    def finish_s(self, sums: Floats, ends: Ends, order: Order, *, link_share: float = 1.0) -> Floats:
        """Predicted seconds of plans whose fetched chunks cost `sums` `[..., costs]`, with this share of the links'
        bandwidth."""
        links = sums[..., :WORK] / link_share
        latencies = np.where(links > 0, self._latencies, 0.0)
        holes, last = sums[..., HOLES], np.broadcast_to(self._tail[ends.tail], sums.shape[:-1])
        load = Load(
            receive=(links + latencies).max(axis=-1, initial=0.0),
            latency=latencies.max(axis=-1, initial=0.0),
            work=sums[..., WORK],
            pieces=sums[..., FETCHED],
            front=np.broadcast_to(self._front[ends.front], last.shape),
            behind=np.where(holes > 0, holes, last),
            rest=np.where(holes > 0, last, 0.0),
        )
        return finish_s(load, order, self.work)

    def _front_seconds(self) -> Floats:
        """Seconds by number of chunks computed at the front; inf where that is impossible."""
        prefill, seconds = self.work.prefill, np.full(self.count + 1, np.inf)
        spent = self.work.engine_busy_s
        pass_tokens, end = PASS_TOKENS, -1
        for number, chunk in enumerate(self.chunks):
            if self.fetchable[number]:  # an unfetchable chunk is computed with those before it
                seconds[number] = spent
            if not (chunk.computable or not chunk.options):
                return seconds
            pass_tokens += chunk.tokens
            if pass_tokens > PASS_TOKENS or chunk.first_token != end:
                spent, pass_tokens = spent + prefill.fixed_s, chunk.tokens
            spent += prefill.seconds(chunk.first_token, chunk.tokens) - prefill.fixed_s
            end = chunk.first_token + chunk.tokens
        seconds[self.count] = spent
        return seconds

    def _tail_seconds(self) -> Floats:
        """Seconds of the last forward pass by number of chunks computed in it; inf where that is impossible."""
        work, seconds = self.work, np.full(self.count + 1, np.inf)
        first, tokens = work.suffix_first, work.suffix_tokens
        for number, chunk in enumerate(reversed(self.chunks)):
            joins = chunk.first_token + chunk.tokens == first
            if self.fetchable[-1 - number] or not joins or not number:
                seconds[number] = work.prefill.seconds(first, tokens)
            if not joins or not (chunk.computable or not chunk.options):
                return seconds
            first, tokens = chunk.first_token, tokens + chunk.tokens
        seconds[self.count] = work.prefill.seconds(first, tokens)
        return seconds

    def _hole_seconds(self) -> Floats:
        """Seconds of forward passes in the middle, by chunk."""
        seconds, end = np.zeros(self.count), -1
        for row in np.flatnonzero(~self.fetchable):
            chunk = self.chunks[row]
            seconds[row] = self.work.prefill.seconds(chunk.first_token, chunk.tokens)
            if chunk.first_token == end:  # one pass with the chunk before it
                seconds[row] -= self.work.prefill.fixed_s
            end = chunk.first_token + chunk.tokens
        return seconds


def _weighted(seconds: Floats, weight: float) -> Floats:
    return np.where(np.isfinite(seconds), seconds * weight if weight else 0.0, np.inf)


def _losses(encodings: Sequence[str]) -> list[int]:
    """Loss of each encoding: the number of more faithful rates among them, which come first."""
    rates = [Encoding.parse(name).rate for name in encodings]
    order = list(dict.fromkeys(rates))
    return [order.index(rate) for rate in rates]
