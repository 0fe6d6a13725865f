"""Planning for an engine that computes nothing while it waits: the leading chunks of a prompt are fetched, then the
engine computes the rest.

How many chunks are worth waiting for, and in which encodings, is one search over all numbers of chunks and a few
assignments of encodings. It works on arrays, so that a scheduler may ask it for every request.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from kvstore_client.planning.base import COMPUTE, Plan, Work
from kvstore_client.planning.predict import arrived_s, predict, shared_s
from kvstore_client.planning.profile import PrefillCost
from kvstore_codec.encoding import Encoding, Rate

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.intp]

UNKNOWN_LINK_Bps = 1.25e9
"""Bandwidth of a link that has brought nothing yet: 10 Gbit/s. A hopeful guess is corrected by the first fetch, which
ends early when it was wrong; after a cautious one nothing might ever be fetched."""

UNKNOWN_PREFILL = PrefillCost(fixed_s=0.0, per_token_s=2e-3, per_pair_s=0.0)
"""Cost of computing before the engine has computed a prompt: 500 tokens per second, slower than most engines. So the
first prompts are fetched on any link that is not very slow."""

TIE = 1.02
"""Plans within this factor of the least predicted time tie. A fetch that gains less is not made; among others that tie
the most faithful one wins, then the longest one."""

_SLOWER = 0.75
"""A fetch must not take longer than computing everything when the links have only this share of their expected
bandwidth."""

_WEIGHTS = (0.0, *(1 / (1 + 4.0**power) for power in range(3, -4, -1)), 1.0)
"""Weights of receiving against decoding, for the assignments that are tried."""


@dataclass(frozen=True, slots=True)
class Offer:
    """The chunks at the beginning of a prompt's rest, in the encodings that they are stored in."""

    bounds: Indices
    """`[chunks + 1]`: position of each chunk's first token, then of the first token behind the last chunk."""
    encodings: tuple[str, ...]
    sizes_bytes: Floats
    """`[chunks, encodings]`; infinite where a chunk is not stored in an encoding."""
    endpoints: tuple[str, ...]
    links: Indices
    """`[chunks]`: index of the endpoint whose link delivers the chunk."""

    def part(self, first: int, end: int) -> "Offer":
        """The chunks `[first, end)`. The arrays are shared."""
        rows = slice(first, end)
        bounds = self.bounds[first : end + 1]
        return Offer(bounds, self.encodings, self.sizes_bytes[rows], self.endpoints, self.links[rows])


@dataclass(frozen=True, slots=True)
class Conditions:
    """What the engine, its decoders and the links can do now."""

    end_token: int
    """Position behind the prompt's last token, which the engine computes in any case."""
    prefill: PrefillCost
    decode_threads: int
    bandwidths_Bps: Mapping[str, float]  # noqa: N815  (bytes, not bits)
    """By endpoint; unknown ones have UNKNOWN_LINK_Bps."""
    latencies_s: Mapping[str, float]
    others_bytes: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Bytes that each of the other fetches still waits for, by endpoint."""
    engine_busy_s: float = 0.0
    """Seconds that the engine works for others before it can begin."""


@dataclass(frozen=True, slots=True)
class LeadingPlan:
    options: tuple[int, ...]
    """Index of the encoding of each leading chunk that is fetched."""
    fetch_s: float
    """Predicted seconds until they are there."""
    total_s: float
    """Predicted seconds until the engine has computed the rest."""

    @property
    def chunks(self) -> int:
        """Number of chunks to fetch."""
        return len(self.options)


def plan_leading(offer: Offer, decode_s: Floats, conditions: Conditions) -> LeadingPlan:
    """The plan with the least predicted time. `decode_s` `[chunks, encodings]` are the seconds of one decoding thread
    for each chunk, infinite where `offer.sizes_bytes` are."""
    compute_s = compute_from_s(offer.bounds, conditions.end_token, conditions.prefill)
    everything_s = conditions.engine_busy_s + float(compute_s[0])
    nothing = LeadingPlan((), 0.0, everything_s)
    absent = np.flatnonzero(~np.isfinite(offer.sizes_bytes).any(axis=1))
    count = int(absent[0]) if len(absent) else len(offer.links)
    if not count:
        return nothing
    rows, compute_s = np.arange(count), compute_s[1 : count + 1]
    sizes, decode_s, links = offer.sizes_bytes[:count], decode_s[:count], offer.links[:count]
    losses = _losses(offer.encodings)
    found: list[tuple[Indices, Floats, Floats, Floats]] = []
    for options in _assignments(
        sizes, decode_s, _bandwidths(offer, conditions)[links], conditions.decode_threads
    ):
        bytes_ = sizes[rows, options]
        work_s = np.cumsum(decode_s[rows, options]) / conditions.decode_threads
        fetch_s, slower_s = (
            _fetch_s(offer, links, bytes_, work_s, conditions, share) for share in (1.0, _SLOWER)
        )
        total_s = np.maximum(fetch_s, conditions.engine_busy_s) + compute_s
        slower_total_s = np.maximum(slower_s, conditions.engine_busy_s) + compute_s
        loss = np.cumsum(losses[options]) / (rows + 1)
        found.append((options, np.where(slower_total_s <= everything_s, total_s, np.inf), fetch_s, loss))
    totals = np.stack([total_s for _, total_s, _, _ in found])
    least_s = float(totals.min())
    if least_s * TIE > everything_s:
        return nothing
    # Among those that tie: the least loss, then the most chunks, then the least time.
    which, place = np.nonzero(totals <= TIE * least_s)
    loss = np.stack([loss for _, _, _, loss in found])[which, place]
    best = np.lexsort((totals[which, place], -place, loss))[0]
    options, total_s, fetch_s, _ = found[which[best]]
    end = int(place[best]) + 1
    return LeadingPlan(
        tuple(int(option) for option in options[:end]), float(fetch_s[end - 1]), float(total_s[end - 1])
    )


def compute_from_s(bounds: Indices, end_token: int, prefill: PrefillCost) -> Floats:
    """Seconds of computing the prompt from each of the positions `bounds` to its end."""
    tokens = (end_token - bounds).astype(np.float64)
    pairs = tokens * (bounds + tokens / 2)
    seconds: Floats = prefill.fixed_s + prefill.per_token_s * tokens + prefill.per_pair_s * pairs
    return seconds


class LeadingPlanner:
    """Fetches leading chunks as whole ones, the first one first, as long as that is faster than computing them.
    Stateless."""

    def plan(self, work: Work) -> Plan:
        known = {
            **dict.fromkeys((chunk.endpoint for chunk in work.chunks), UNKNOWN_LINK_Bps),
            **work.bandwidths_Bps,
        }
        work = replace(work, bandwidths_Bps=known)
        choices = dict.fromkeys((chunk.index for chunk in work.chunks), COMPUTE)
        if work.chunks:
            offer, decode_s = _offer(work)
            conditions = Conditions(
                work.suffix_first + work.suffix_tokens,
                work.prefill,
                work.decode_threads,
                work.bandwidths_Bps,
                work.latencies_s,
                work.others_bytes,
                work.engine_busy_s,
            )
            for chunk, option in zip(
                work.chunks, plan_leading(offer, decode_s, conditions).options, strict=False
            ):
                names = [one.encoding for one in chunk.options]
                choices[chunk.index] = names.index(offer.encodings[option])
        return predict(work, choices, "front")


def _offer(work: Work) -> tuple[Offer, Floats]:
    """The chunks of `work` as arrays, and the seconds of decoding them."""
    names = dict.fromkeys(option.encoding for chunk in work.chunks for option in chunk.options)
    columns = {name: column for column, name in enumerate(names)}
    endpoints = {
        name: link for link, name in enumerate(dict.fromkeys(chunk.endpoint for chunk in work.chunks))
    }
    sizes = np.full((len(work.chunks), max(len(columns), 1)), np.inf)
    decode_s = np.full_like(sizes, np.inf)
    for row, chunk in enumerate(work.chunks):
        for option in chunk.options:
            sizes[row, columns[option.encoding]] = option.size_bytes
            decode_s[row, columns[option.encoding]] = option.work_s
    firsts = [chunk.first_token for chunk in work.chunks]
    bounds = np.array([*firsts, work.suffix_first], np.intp)
    links = np.array([endpoints[chunk.endpoint] for chunk in work.chunks], np.intp)
    return Offer(bounds, tuple(columns), sizes, tuple(endpoints), links), decode_s


def _bandwidths(offer: Offer, conditions: Conditions) -> Floats:
    return np.array([conditions.bandwidths_Bps.get(name, UNKNOWN_LINK_Bps) for name in offer.endpoints])


def _assignments(sizes: Floats, decode_s: Floats, bandwidths: Floats, threads: int) -> list[Indices]:
    """Encodings of all chunks: along the lower hull from the least decoding to the least receiving, and each encoding
    for all chunks that have it."""
    receive_s, decode_s = sizes / bandwidths[:, None], decode_s / threads
    quickest = np.argmin(np.maximum(receive_s, decode_s), axis=1)
    found = {tuple(quickest): quickest}
    for weight in _WEIGHTS:
        options = np.argmin(_weighted(receive_s, weight) + _weighted(decode_s, 1 - weight), axis=1)
        found[tuple(options)] = options
    for column in range(sizes.shape[1]):
        options = np.where(np.isfinite(sizes[:, column]), column, quickest)
        found[tuple(options)] = options
    return list(found.values())


def _weighted(seconds: Floats, weight: float) -> Floats:
    return np.where(np.isfinite(seconds), seconds * weight if weight else 0.0, np.inf)


def _fetch_s(
    offer: Offer,
    links: Indices,
    sizes_bytes: Floats,
    work_s: Floats,
    conditions: Conditions,
    link_share: float,
) -> Floats:
    """`[chunks]`: seconds until the first 1, 2, ... chunks have arrived and are decoded."""
    receive_s, latency_s = np.zeros(len(links)), np.zeros(len(links))
    for link, endpoint in enumerate(offer.endpoints):
        mine = links == link
        if not mine.any():
            continue
        bandwidth = conditions.bandwidths_Bps.get(endpoint, UNKNOWN_LINK_Bps) * link_share
        others_s = [size / bandwidth for size in conditions.others_bytes.get(endpoint, ())]
        seconds = np.cumsum(np.where(mine, sizes_bytes, 0.0)) / bandwidth
        latency = np.where(seconds > 0, conditions.latencies_s.get(endpoint, 0.0), 0.0)
        receive_s = np.maximum(receive_s, latency + shared_s(seconds, others_s))
        latency_s = np.maximum(latency_s, latency)
    pieces = np.arange(1.0, len(links) + 1.0)
    return arrived_s(receive_s, latency_s, work_s, pieces, conditions.decode_threads)


def _losses(encodings: Sequence[str]) -> Floats:
    """Number of rates that are more faithful than each encoding's. The loss of an explicit step is unknown, and counts
    as more than that of any rate."""
    rates = [Encoding.parse(name).rate for name in encodings]
    return np.array([rate.rank if isinstance(rate, Rate) else len(Rate) for rate in rates], np.float64)
