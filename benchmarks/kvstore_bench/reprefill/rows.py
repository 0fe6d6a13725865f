"""Makes the rows of the result from the measurements."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvstore_bench.reprefill.prompts import Question
from kvstore_bench.reprefill.systems import Asked

Row = dict[str, Any]

_RIGHT = 0.5
"""An answer is right when more than this share of its tokens are the most likely ones."""


@dataclass(frozen=True, slots=True)
class Fidelity:
    """How a system's predictions differ from those over the whole prefix."""

    kl: float
    """Nats per token, mean over questions."""
    kl_by_kind: dict[str, float]
    top1: float
    """Share of tokens whose most likely prediction is the same."""
    right: float
    """Share of the facts that are told right."""


def fidelity_of(
    questions: Sequence[Question], exact: Sequence[torch.Tensor], found: Sequence[torch.Tensor]
) -> Fidelity:
    """Compares predictions at the judged tokens of each question. `exact` and `found` are log-probabilities at all
    its tokens."""
    kl: dict[str, list[float]] = {}
    top1: list[float] = []
    right: list[bool] = []
    for question, reference, predicted in zip(questions, exact, found, strict=True):
        # The prediction of a token is at the one before it.
        places = slice(-question.judged - 1, -1)
        wanted, got = reference[places], predicted[places]
        kl.setdefault(question.kind, []).append(float((wanted.exp() * (wanted - got)).sum(-1).mean()))
        top1.append(float((wanted.argmax(-1) == got.argmax(-1)).float().mean()))
        if question.answer is not None:
            right.append(
                bool((got.argmax(-1) == question.tokens[-question.judged :]).float().mean() > _RIGHT)
            )
    every = [value for values in kl.values() for value in values]
    return Fidelity(
        statistics.fmean(every),
        {kind: statistics.fmean(values) for kind, values in kl.items()},
        statistics.fmean(top1),
        statistics.fmean(right) if right else 0.0,
    )


def row_of(asked: Sequence[Asked], fidelity: Fidelity | None, **facts: Any) -> Row:
    """One row. Sizes and tokens are means over the questions, times are medians. `facts` are its other fields."""
    rate = facts.get("disk_bandwidth_Bps")
    ttft_s = sorted(one.ttft_s for one in asked)
    needed = statistics.fmean(one.bytes_needed for one in asked)
    read = statistics.fmean(one.bytes_read for one in asked)
    summaries = statistics.fmean(one.summary_bytes for one in asked)
    return {
        **facts,
        "ttft_s": statistics.median(ttft_s),
        "p95_s": ttft_s[min(len(ttft_s) - 1, int(0.95 * len(ttft_s)))],
        "bytes_read": read,
        "bytes_needed": needed,
        "summary_bytes": summaries,
        "read_amplification": read / needed if needed else None,
        "frame_amplification": (read - summaries) / needed if needed else None,
        "tokens_read": statistics.fmean(one.tokens_read for one in asked),
        "cache_hit_rate": statistics.fmean(one.cache_hit_rate for one in asked),
        "idle_compute_fraction": statistics.fmean(one.waited_s / one.ttft_s for one in asked),
        "idle_io_fraction": statistics.fmean(
            1 - min(1.0, _reading_s(one, rate) / one.ttft_s) for one in asked
        ),
        "kl": None if fidelity is None else fidelity.kl,
        "kl_by_kind": None if fidelity is None else fidelity.kl_by_kind,
        "top1": None if fidelity is None else fidelity.top1,
        "right": None if fidelity is None else fidelity.right,
    }


def _reading_s(one: Asked, rate: float | None) -> float:
    """How long the disk read. What a read takes beyond the time that a limited disk needs is not the disk's."""
    return one.reading_s if rate is None else one.bytes_read / rate
