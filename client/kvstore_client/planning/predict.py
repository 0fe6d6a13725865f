"""Time model of a plan, which planners search and plans quote.

Three stages run in parallel. Bytes arrive through the endpoints' links, independently. Decoding threads turn them into
KV. The engine computes: the *front* (chunks with only finished chunks before them) needs nothing that is fetched;
tokens *behind* fetched chunks wait for them, layer by layer in the order "layers", as a whole in the order "back".
Decoding and computing share the processor, as far as `interference` says. In the order "front" the engine computes
nothing meanwhile, and then everything behind the first chunk that is not fetched.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from kvstore_client.planning.base import COMPUTE, Bound, ChunkWork, Order, Plan, Work
from kvstore_client.planning.links import DEFAULT_BANDWIDTH_Bps
from kvstore_client.planning.profile import PrefillCost

PASS_TOKENS = 1024
"""Number of tokens in one forward pass over the front. Shorter passes make small, slow matrix multiplications. The
chunks of a begun pass cannot be fetched any more when the link gets faster, so passes are not longer."""

_PERIODS = 8
"""Approximate number of periods of a model: a chunk is read in this many pieces, and the engine proceeds with each."""

_SLOWEST_Bps = 1.0
"""Least bandwidth of a link, so that its time stays finite."""

Seconds = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Load:
    """Seconds that a plan needs of each stage: of one plan (0-dimensional arrays), or of many at once."""

    receive: Seconds
    """Until the last byte, including latency."""
    latency: Seconds
    work: Seconds
    """Decoding and restoring, sum over all threads."""
    pieces: Seconds
    """Number of fetched chunks."""
    front: Seconds
    behind: Seconds
    """The first forward pass that needs fetched KV."""
    rest: Seconds
    """The passes after that one."""


def bandwidth_of(work: Work, endpoint: str) -> float:
    return max(work.bandwidths_Bps.get(endpoint, DEFAULT_BANDWIDTH_Bps), _SLOWEST_Bps)


def finish_s(load: Load, order: Order, work: Work) -> Seconds:
    """Seconds to the end of the last forward pass, elementwise. A stage begins when the one before it has finished its
    first piece, and ends at least one piece after it; no stage ends before its own work is done."""
    if order == "front":
        threads = work.decode_threads
        arrived = arrived_s(load.receive, load.latency, load.work, load.pieces, threads)
        waited: Seconds = np.maximum(arrived, load.front) + load.behind + load.rest
        return waited
    # Links are slower while the engine computes chunks; the suffix only waits for them and does not slow them down.
    suffix_s = work.prefill.seconds(work.suffix_first, work.suffix_tokens)
    computing = np.maximum(load.front + load.behind + load.rest - suffix_s, 0.0)
    disturbed = np.minimum(computing, load.receive / work.busy_share)
    load = replace(load, receive=load.receive + (1.0 - work.busy_share) * disturbed)
    fetching = load.pieces > 0
    transfer = np.maximum(load.receive - load.latency, 0.0)
    first_read, read_work = _reads(load.receive, load.latency, load.work, load.pieces, work.decode_threads)
    received, decoded = load.receive + read_work, first_read + load.work
    idle = np.maximum(first_read - load.front, 0.0)
    if order == "back":
        shared = idle + _together(load.work, load.front, work.interference)
        last: Seconds = np.maximum(np.maximum(received, decoded), shared) + load.behind + load.rest
        return last
    first_period = np.maximum(
        np.where(fetching, load.latency + transfer / _PERIODS + read_work, 0.0),
        first_read + load.work / _PERIODS,
    )
    last_period = load.behind / _PERIODS
    computed = np.maximum(load.front, first_period) + load.behind
    idle = np.maximum(idle, first_period - load.front - load.work / _PERIODS)
    shared = idle + _together(load.work, load.front + load.behind, work.interference)
    there = np.maximum(received, decoded) + last_period
    first_pass: Seconds = np.maximum(there, np.maximum(computed, shared))
    return first_pass + load.rest


def arrived_s(
    receive: Seconds, latency: Seconds, work: Seconds, pieces: Seconds, decode_threads: int
) -> Seconds:
    """Seconds until fetched chunks are received and decoded, elementwise; the arguments are those of a Load."""
    first_read, read_work = _reads(receive, latency, work, pieces, decode_threads)
    seconds: Seconds = np.maximum(receive + read_work, first_read + work)
    return seconds


def shared_s(seconds: Seconds, others_s: Sequence[float]) -> Seconds:
    """Seconds of a transfer that takes `seconds` alone, on a link that it shares evenly with others, each as long as
    that one lasts."""
    together: Seconds = seconds + sum(np.minimum(seconds, other_s) for other_s in others_s)
    return together


def _reads(
    receive: Seconds, latency: Seconds, work: Seconds, pieces: Seconds, decode_threads: int
) -> tuple[Seconds, Seconds]:
    """Seconds until the first read has arrived, and of decoding one read."""
    reads = np.maximum(pieces, 1.0) * _PERIODS
    transfer = np.maximum(receive - latency, 0.0)
    first_read = np.where(pieces > 0, latency + transfer / reads, 0.0)
    return first_read, work * decode_threads / reads  # by the one thread that has the last read


def _together(one: Seconds, other: Seconds, interference: float) -> Seconds:
    return np.maximum(one, other) + interference * np.minimum(one, other)


def predict(work: Work, choices: Mapping[int, int], order: Order) -> Plan:
    """The plan with these choices, which must be among the chunks' options."""
    received_s: dict[str, float] = {}
    work_s, fetched = 0.0, 0
    for chunk in work.chunks:
        choice = choices[chunk.index]
        if choice != COMPUTE:
            option = chunk.options[choice]
            seconds = option.size_bytes / bandwidth_of(work, chunk.endpoint)
            received_s[chunk.endpoint] = received_s.get(chunk.endpoint, 0.0) + seconds
            work_s += option.work_s
            fetched += 1
    latencies = {endpoint: work.latencies_s.get(endpoint, 0.0) for endpoint in received_s}
    receive = max(
        (
            latencies[endpoint] + float(shared_s(np.asarray(seconds), _others_s(work, endpoint)))
            for endpoint, seconds in received_s.items()
        ),
        default=0.0,
    )
    front, behind, rest = _waiting_passes(work, choices) if order == "front" else _passes(work, choices)
    work_s /= work.decode_threads
    latency = max(latencies.values(), default=0.0)
    load = Load(
        *(np.asarray(value, np.float64) for value in (receive, latency, work_s, fetched, front, behind, rest))
    )
    stages: dict[Bound, float] = {"receive": receive, "decode": work_s, "compute": front + behind + rest}
    return Plan(
        choices=dict(choices),
        order=order,
        predicted_s=float(finish_s(load, order, work)),
        fetch_s=float(arrived_s(load.receive, load.latency, load.work, load.pieces, work.decode_threads)),
        bound_by=max(stages, key=lambda stage: stages[stage]),
    )


def _others_s(work: Work, endpoint: str) -> list[float]:
    return [size / bandwidth_of(work, endpoint) for size in work.others_bytes.get(endpoint, ())]


def _waiting_passes(work: Work, choices: Mapping[int, int]) -> tuple[float, float, float]:
    """As `_passes`, in the order "front": one pass, from the first chunk that is not fetched to the prompt's end."""
    first = next((c.first_token for c in work.chunks if choices[c.index] == COMPUTE), work.suffix_first)
    tokens = work.suffix_first + work.suffix_tokens - first
    return work.engine_busy_s, work.prefill.seconds(first, tokens), 0.0


def _passes(work: Work, choices: Mapping[int, int]) -> tuple[float, float, float]:
    """Seconds of the front, of the first forward pass behind fetched chunks, and of the passes after it. Without
    fetched chunks there is no front: the engine computes everything at once."""
    computed = [choices[chunk.index] == COMPUTE for chunk in work.chunks]
    leading = 0 if all(computed) else computed.index(False)
    front = work.engine_busy_s + sum(
        run_s(work.prefill, first, tokens) for first, tokens in runs(work.chunks[:leading])
    )
    behind = runs(chunk for chunk in work.chunks[leading:] if choices[chunk.index] == COMPUTE)
    if behind and sum(behind[-1]) == work.suffix_first:
        first, tokens = behind.pop()
        behind.append((first, tokens + work.suffix_tokens))
    elif work.suffix_tokens:
        behind.append((work.suffix_first, work.suffix_tokens))
    seconds = [work.prefill.seconds(first, tokens) for first, tokens in behind]
    return front, sum(seconds[:1]), sum(seconds[1:])


def runs(chunks: Iterable[ChunkWork]) -> list[tuple[int, int]]:
    """First token and number of tokens of each stretch of contiguous chunks."""
    found: list[tuple[int, int]] = []
    for chunk in chunks:
        if found and sum(found[-1]) == chunk.first_token:
            found[-1] = found[-1][0], found[-1][1] + chunk.tokens
        else:
            found.append((chunk.first_token, chunk.tokens))
    return found


def run_s(prefill: PrefillCost, first_token: int, tokens: int) -> float:
    """Seconds of a stretch that is computed in passes of up to PASS_TOKENS."""
    passes = -(-tokens // PASS_TOKENS)
    return prefill.seconds(first_token, tokens) + max(passes - 1, 0) * prefill.fixed_s
