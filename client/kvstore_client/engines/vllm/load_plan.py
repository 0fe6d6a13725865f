"""Decides how much of a prompt is loaded: never more than what is faster to load than to compute."""

import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from kvstore_client.engines.vllm.worker_news import Learned
from kvstore_client.match import Match
from kvstore_client.planning import CodecCost, PrefillCost, Profile
from kvstore_client.planning.leading import (
    UNKNOWN_PREFILL,
    Conditions,
    Floats,
    Offer,
    UNKNOWN_LINK_Bps,
    plan_leading,
)
from kvstore_codec.identity import CHUNK_TOKENS
from kvstore_codec.model_spec import ModelSpec

_UNMEASURED_Bps = 1e9
"""KV that a thread is assumed to decode in a second before it has decoded anything."""

_REMEMBERED = 8
"""Loads whose delays are remembered; the least of these delays is expected of the next load."""

_FORGOTTEN_S = 30.0
"""The expected delay halves in this time while no load ends, and so does the cost of decoding while all loads are
turned down. Where they keep prompts from being loaded, no load would show that the engine's steps are short again, or
that its processor has time for decoding."""

_LEAST_LEFT = 0.1
"""Share of its bytes that a load in flight still has to receive at least, however late it is."""


@dataclass(frozen=True, slots=True)
class PlannedLoad:
    """Part of a prompt that is worth loading."""

    end_token: int
    fetch_s: float
    """Predicted seconds of the fetch alone."""
    sizes_bytes: Mapping[str, float]
    """By endpoint."""


def unmeasured(spec: ModelSpec) -> CodecCost:
    """Assumed cost of decoding before anything was decoded: a hopeful one, which the first load corrects."""
    return CodecCost(spec.kv_bytes_per_token / _UNMEASURED_Bps, 0.0)


def offer_of(match: Match) -> Offer:
    """The chunks of a match from the prompt's beginning, as a planner reads them. Takes a while for a long match."""
    names = {variant.header.encoding.name for chunk in match.chunks for variant in chunk.variants}
    columns = {name: column for column, name in enumerate(sorted(names))}
    members = dict.fromkeys(chunk.member.endpoint for chunk in match.chunks)
    endpoints = {name: link for link, name in enumerate(members)}
    sizes = np.full((len(match.chunks), max(len(columns), 1)), np.inf)
    for row, chunk in enumerate(match.chunks):
        for variant in chunk.variants:
            if variant.is_decodable:
                header = variant.header
                sizes[row, columns[header.encoding.name]] = header.size_bytes - header.header_bytes
    links = np.array([endpoints[chunk.member.endpoint] for chunk in match.chunks], np.intp)
    bounds = np.arange(len(match.chunks) + 1) * CHUNK_TOKENS
    return Offer(bounds, tuple(columns), sizes, tuple(endpoints), links)


@dataclass(frozen=True, slots=True)
class _InFlight:
    planned: PlannedLoad
    begun_s: float


class LoadPlanner:
    """Plans loads by what the engine's steps and the worker's fetches have shown. Used by the scheduler's thread; reads
    no clock but its own, and waits for nothing."""

    def __init__(
        self, spec: ModelSpec, decode_threads: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._spec, self._decode_threads, self._clock = spec, decode_threads, clock
        self._learned = Learned()
        self._in_flight: dict[str, _InFlight] = {}
        self._delays: deque[float] = deque(maxlen=_REMEMBERED)
        self._delay_seen_s = 0.0
        self._turned_down_s: float | None = None
        """Since when nothing that is stored was worth loading."""

    def learn(self, learned: Learned) -> None:
        self._learned = learned

    def plan(
        self,
        offer: Offer,
        first_token: int,
        end_token: int,
        prompt_tokens: int,
        prefill: PrefillCost | None,
        busy_s: float,
    ) -> PlannedLoad | None:
        """How much of `[first_token, end_token)` to load; None for nothing. `prefill` is None where no prompt was
        computed yet. The engine works `busy_s` for others before it can begin."""
        first_chunk, end_chunk = first_token // CHUNK_TOKENS, -(-end_token // CHUNK_TOKENS)
        part = offer.part(first_chunk, end_chunk)
        bounds = np.clip(part.bounds, first_token, end_token)
        part = Offer(bounds, part.encodings, part.sizes_bytes, part.endpoints, part.links)
        bandwidths = {endpoint: self._bandwidth_Bps(endpoint) for endpoint in part.endpoints}
        delay_s = self._delay_s()
        conditions = Conditions(
            prompt_tokens,
            prefill or UNKNOWN_PREFILL,
            self._decode_threads,
            bandwidths,
            {endpoint: self._latency_s(endpoint) + delay_s for endpoint in part.endpoints},
            self._others_bytes(),
            busy_s,
        )
        plan = plan_leading(part, self._decode_s(part), conditions)
        if not plan.chunks:
            if self._turned_down_s is None and not self._in_flight:
                self._turned_down_s = self._clock()
            return None
        rows = np.arange(plan.chunks)
        sizes = part.sizes_bytes[rows, list(plan.options)]
        links = part.links[rows]
        by_endpoint = {name: float(sizes[links == link].sum()) for link, name in enumerate(part.endpoints)}
        return PlannedLoad(int(bounds[plan.chunks]), max(plan.fetch_s - delay_s, 0.0), by_endpoint)

    def begun(self, request_id: str, planned: PlannedLoad) -> None:
        self._in_flight[request_id] = _InFlight(planned, self._clock())
        self._turned_down_s = None

    def ended(self, request_id: str, *, complete: bool) -> None:
        """A load has ended. What a `complete` one took longer than its fetch is expected of later ones."""
        done = self._in_flight.pop(request_id, None)
        if done is not None and complete:
            self._delay_seen_s = self._clock()
            self._delays.append(max(self._delay_seen_s - done.begun_s - done.planned.fetch_s, 0.0))

    def _delay_s(self) -> float:
        """What the next load is expected to take longer than its fetch."""
        unseen_s = self._clock() - self._delay_seen_s
        return min(self._delays, default=0.0) * math.exp2(-unseen_s / _FORGOTTEN_S)

    def _decode_s(self, offer: Offer) -> Floats:
        """`[chunks, encodings]`: seconds of one thread, infinite where `offer.sizes_bytes` are."""
        learned = self._learned
        known = Profile(
            learned.codecs, UNKNOWN_PREFILL, 0.0, self._decode_threads, unmeasured=unmeasured(self._spec)
        )
        unseen_s = 0.0 if self._turned_down_s is None else self._clock() - self._turned_down_s
        remembered = math.exp2(-unseen_s / _FORGOTTEN_S)
        costs = [known.codec(name) for name in offer.encodings]
        per_chunk = np.array([(cost.decode_s + cost.restore_s) * CHUNK_TOKENS for cost in costs])
        stored = np.isfinite(offer.sizes_bytes)
        sizes_bytes = np.where(stored, offer.sizes_bytes, 0.0)
        decode_s = (sizes_bytes * learned.receive_s_per_byte + per_chunk) * remembered
        return np.where(stored, decode_s, np.inf)

    def _bandwidth_Bps(self, endpoint: str) -> float:  # noqa: N802
        """That of the slowest link for an endpoint that has sent nothing yet."""
        links = self._learned.links
        if endpoint in links:
            return links[endpoint][0]
        return min((bandwidth_Bps for bandwidth_Bps, _ in links.values()), default=UNKNOWN_LINK_Bps)

    def _latency_s(self, endpoint: str) -> float:
        return self._learned.links[endpoint][1] if endpoint in self._learned.links else 0.0

    def _others_bytes(self) -> dict[str, list[float]]:
        """Bytes that each load in flight still waits for, by endpoint."""
        now_s, found = self._clock(), dict[str, list[float]]()
        for load in self._in_flight.values():
            done = (now_s - load.begun_s) / max(load.planned.fetch_s, 1e-3)
            for endpoint, size_bytes in load.planned.sizes_bytes.items():
                if size_bytes:
                    found.setdefault(endpoint, []).append(size_bytes * max(1.0 - done, _LEAST_LEFT))
        return found
