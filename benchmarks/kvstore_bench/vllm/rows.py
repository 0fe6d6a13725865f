"""The rows of benchmarks/vllm_ttft.py, from single requests."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kvstore_bench.vllm.links import link_name

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Sample:
    """One request."""

    policy: str
    prompt_tokens: int
    bandwidth_bps: float | None
    """None: the unshaped link."""
    round: int
    text: int
    ttft_s: float | None
    """None: the request failed."""
    reused_tokens: int = 0
    link_bytes: int = 0
    """From the store to the engine, packet headers included."""
    decode_tokens_per_s: float | None = None
    same_as_cold: bool | None = None
    """Whether the answer has the tokens of a cold run."""
    same_as_memory_hit: bool | None = None
    """Whether it has those of vLLM's own prefix cache, with as many tokens reused."""
    failure: str | None = None
    counted: bool = True
    """False: one of a planning policy's first requests after the link has changed."""

    def row(self) -> Row:
        return {"link": link_name(self.bandwidth_bps), **asdict(self)}


def rows_of(samples: Sequence[Sample], left_out: Mapping[str, str]) -> list[Row]:
    """A row for each length, link and policy, in the order in which they were measured. `left_out` are policies that
    could not be measured, with the reason."""
    groups: dict[tuple[int, float | None, str], list[Sample]] = {}
    for sample in samples:
        groups.setdefault((sample.prompt_tokens, sample.bandwidth_bps, sample.policy), []).append(sample)
    rows = []
    for (tokens, bandwidth_bps, policy), group in groups.items():
        cold = _times(groups.get((tokens, bandwidth_bps, "cold"), ()))
        rows.append(_row(tokens, bandwidth_bps, policy, group, cold, left_out.get(policy)))
    measured = {row["policy"] for row in rows}
    rows += [{"policy": name, "failure": why} for name, why in left_out.items() if name not in measured]
    return rows


def _row(
    tokens: int,
    bandwidth_bps: float | None,
    policy: str,
    samples: Sequence[Sample],
    cold_s: Sequence[float],
    left_out: str | None,
) -> Row:
    counted = [sample for sample in samples if sample.counted]
    answered = [sample for sample in counted if sample.ttft_s is not None]
    times_s = _times(counted)
    failures = [sample.failure for sample in counted if sample.failure]
    first_s = [sample.ttft_s for sample in samples if not sample.counted and sample.ttft_s is not None]
    ttft_s, cold_ttft_s = _median(times_s), _median(cold_s)
    return {
        "prompt_tokens": tokens,
        "link": link_name(bandwidth_bps),
        "bandwidth_bps": bandwidth_bps,
        "policy": policy,
        "rounds": len(times_s),
        "ttft_s": ttft_s,
        "ttft_min_s": min(times_s, default=None),
        "ttft_max_s": max(times_s, default=None),
        **_quartiles(times_s),
        "cold_ttft_s": cold_ttft_s,
        "speedup_over_cold": cold_ttft_s / ttft_s if cold_ttft_s and ttft_s else None,
        "first_ttft_after_link_change_s": _median(first_s),
        "reused_tokens": _median([sample.reused_tokens for sample in answered]),
        "link_bytes": _median([sample.link_bytes for sample in answered]),
        "decode_tokens_per_s": _median(
            [s.decode_tokens_per_s for s in answered if s.decode_tokens_per_s is not None]
        ),
        "answers_compared": sum(sample.same_as_cold is not None for sample in answered),
        "answers_same_as_cold": sum(sample.same_as_cold is True for sample in answered),
        "answers_same_as_memory_hit": sum(sample.same_as_memory_hit is True for sample in answered),
        "failed_requests": len(failures),
        "failure": failures[-1] if failures else left_out,
    }


def _times(samples: Sequence[Sample]) -> list[float]:
    return [sample.ttft_s for sample in samples if sample.counted and sample.ttft_s is not None]


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def _quartiles(times_s: Sequence[float]) -> dict[str, float | None]:
    if not times_s:
        return {"ttft_q1_s": None, "ttft_q3_s": None}
    several = times_s if len(times_s) > 1 else [*times_s, *times_s]
    first, _, third = statistics.quantiles(several, n=4, method="inclusive")
    return {"ttft_q1_s": first, "ttft_q3_s": third}
