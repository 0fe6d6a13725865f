"""Makes the rows of the result from the samples of all questions."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvstore_bench.link.options import Options
from kvstore_bench.link.policies import Policy, is_at_least
from kvstore_bench.shaping.jitter import Schedule
from kvstore_service.bandwidth import format_bandwidth

Row = dict[str, Any]
Sample = Mapping[str, Any]

SHOWN_STAGES = ("receive", "decode", "restore", "compute")


@dataclass(frozen=True, slots=True)
class Cell:
    """One combination of conditions that all policies are measured under."""

    bandwidth_bps: float
    tokens: int
    jitter: str
    schedule: Schedule

    @property
    def title(self) -> str:
        jitter = "" if self.jitter == "none" else f", {self.jitter}"
        return f"{self.tokens} tokens, {format_bandwidth(self.bandwidth_bps)}{jitter}"


def row_of(
    cell: Cell,
    policy: Policy,
    samples: Mapping[str, Sequence[Sample]],
    judged: Mapping[tuple[str, int], Sample],
    options: Options,
) -> Row:
    """Row of one policy. `samples` has the samples by policy, the warm-up first. `judged` has samples with fidelity, by
    policy and document length."""
    measured = _measured(samples[policy.name])
    times_s = [sample["ttft_s"] for sample in measured]
    fidelity = judged[policy.name, cell.tokens]
    # These values come from one run, the one nearest to the median, so that they are consistent with each other.
    typical = min(measured, key=lambda sample: abs(sample["ttft_s"] - statistics.median(times_s)))
    return {
        "bandwidth_bps": cell.bandwidth_bps,
        "tokens": cell.tokens,
        "policy": policy.name,
        "ttft_s": statistics.median(times_s),
        "cold_ttft_s": statistics.median(sample["ttft_s"] for sample in _measured(samples["cold"])),
        "bytes": int(statistics.median(sample["bytes"] for sample in measured)),
        "kl": fidelity["kl"],
        "same_tokens": fidelity["same_tokens"],
        "kind": policy.kind,
        "dtype": options.dtype,
        "shaper": options.shaper,
        "jitter": cell.jitter,
        "repeats": len(measured),
        "ttft_min_s": min(times_s),
        "ttft_max_s": max(times_s),
        **_quartiles(times_s),
        "reused_tokens": typical["reused_tokens"],
        "computed_tokens": typical["computed_tokens"],
        "encodings": typical["encodings"],
        "stage_s": {stage: typical["stage_s"][stage] for stage in SHOWN_STAGES},
        "ttft_over_longest_stage": _over_longest_stage(typical),
        "replans": max(sample["replans"] for sample in measured),
        "meets_floor": _meets(policy, measured, options),
    }


def _measured(samples: Sequence[Sample]) -> Sequence[Sample]:
    """The samples after the warm-up, or the warm-up if it is the only one."""
    return samples[1:] or samples


def _quartiles(times_s: Sequence[float]) -> dict[str, float]:
    several = times_s if len(times_s) > 1 else [*times_s, *times_s]
    first, _, third = statistics.quantiles(several, n=4, method="inclusive")
    return {"ttft_q1_s": first, "ttft_q3_s": third}


def _over_longest_stage(sample: Sample) -> float:
    return float(sample["ttft_s"] / max(sample["stage_s"][stage] for stage in SHOWN_STAGES))


def _meets(policy: Policy, samples: Sequence[Sample], options: Options) -> bool | None:
    """Whether the delivered encodings are at least as precise as the floor. None if their names do not tell."""
    if policy.chooses and options.floor is not None:
        floor = options.floor
        return all(is_at_least(name, floor) for sample in samples for name in sample["encodings"])
    return policy.meets(options.floor)
