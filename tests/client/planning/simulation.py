"""A fetch in virtual time, event by event: what a plan really takes, without the planner's closed forms.

Links send their reads one after the other. Decoding threads take what has arrived, in that order. The engine computes
pass by pass, a pass in as many steps as there are periods, each behind that period of every chunk before the pass.
While both work, and all decoding threads do, decoding and computing run at 1 / (1 + interference) of their speed.
"""

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvstore_client.planning import COMPUTE, ChunkWork, Work

PERIODS = 8
PASS_TOKENS = 1024


@dataclass
class _Step:
    """A part of a forward pass."""

    seconds: float
    needs: frozenset[tuple[int, int]]
    """(chunk, period) that must be decoded."""


def simulate(work: Work, choices: Mapping[int, int], order: str) -> float:
    arrivals = _arrivals(work, choices, order)
    steps = _steps(work, choices)
    now, arrived, undecoded = 0.0, 0, []
    waiting = {read for _, read, _ in arrivals}
    decoding: list[list[object]] = []  # [seconds left, read]
    step = 0
    left = steps[0].seconds if steps else 0.0
    while step < len(steps):
        while arrived < len(arrivals) and arrivals[arrived][0] <= now:
            heapq.heappush(undecoded, (arrived, *arrivals[arrived][1:]))
            arrived += 1
        while undecoded and len(decoding) < work.decode_threads:
            _, read, seconds = heapq.heappop(undecoded)
            decoding.append([seconds, read])
        computing = not (steps[step].needs & waiting)
        busy = len(decoding) / work.decode_threads if computing else 0.0
        speed = 1 / (1 + work.interference * busy)
        until = [arrivals[arrived][0] - now] if arrived < len(arrivals) else []
        until += [float(item[0]) / speed for item in decoding]  # type: ignore[arg-type]
        until += [left / speed] if computing else []
        passed = min(until)
        assert math.isfinite(passed)
        now += passed
        for item in decoding:
            item[0] = float(item[0]) - passed * speed  # type: ignore[arg-type]
        for item in [item for item in decoding if float(item[0]) <= 1e-12]:  # type: ignore[arg-type]
            decoding.remove(item)
            waiting.discard(item[1])  # type: ignore[arg-type]
        if computing:
            left -= passed * speed
            if left <= 1e-12:
                step += 1
                left = steps[step].seconds if step < len(steps) else 0.0
    return now


def _arrivals(
    work: Work, choices: Mapping[int, int], order: str
) -> list[tuple[float, tuple[int, int], float]]:
    """When each read is there, which it is, and its seconds of decoding."""
    reads = [
        (chunk, period)
        for chunk in work.chunks
        if choices[chunk.index] != COMPUTE
        for period in range(PERIODS)
    ]
    reads.sort(key=lambda read: (read[1], read[0].index) if order == "layers" else (-read[0].index, read[1]))
    ends: dict[str, float] = {}
    found = []
    for chunk, period in reads:
        option, endpoint = chunk.options[choices[chunk.index]], chunk.endpoint
        start = ends.get(endpoint, work.latencies_s.get(endpoint, 0.0))
        ends[endpoint] = start + option.size_bytes / PERIODS / work.bandwidths_Bps[endpoint]
        found.append((ends[endpoint], (chunk.index, period), option.work_s / PERIODS))
    return sorted(found)


def _steps(work: Work, choices: Mapping[int, int]) -> list[_Step]:
    fetched = [chunk.index for chunk in work.chunks if choices[chunk.index] != COMPUTE]
    steps = [_Step(work.engine_busy_s, frozenset())] if work.engine_busy_s else []
    stretch: list[ChunkWork] = []
    passes: list[list[ChunkWork]] = []
    for chunk in work.chunks:
        if choices[chunk.index] != COMPUTE:
            continue
        in_front = bool(fetched) and chunk.index < fetched[0]
        joins = stretch and stretch[-1].first_token + stretch[-1].tokens == chunk.first_token
        if not joins or (in_front and sum(c.tokens for c in stretch) + chunk.tokens > PASS_TOKENS):
            stretch = []
            passes.append(stretch)
        stretch.append(chunk)
    spans = [(p[0].first_token, sum(chunk.tokens for chunk in p)) for p in passes]
    if spans and sum(spans[-1]) == work.suffix_first and (not fetched or passes[-1][0].index > fetched[0]):
        spans[-1] = spans[-1][0], spans[-1][1] + work.suffix_tokens
    else:
        spans.append((work.suffix_first, work.suffix_tokens))
    firsts = {chunk.index: chunk.first_token for chunk in work.chunks}
    for first, tokens in spans:
        seconds = work.prefill.seconds(first, tokens)
        steps += [
            _Step(seconds / PERIODS, frozenset((index, period) for index in fetched if firsts[index] < first))
            for period in range(PERIODS)
        ]
    return steps


def uniform_choices(work: Work, encoding: str) -> dict[int, int]:
    """Every chunk in this encoding."""
    return {
        chunk.index: [option.encoding for option in chunk.options].index(encoding) for chunk in work.chunks
    }


def computed(chunks: Sequence[ChunkWork]) -> dict[int, int]:
    return {chunk.index: COMPUTE for chunk in chunks}
