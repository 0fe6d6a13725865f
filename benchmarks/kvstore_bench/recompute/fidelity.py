"""Measures fidelity: how far the model's predictions after reused documents are from those after full recompute."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvstore_bench.recompute.engine import Engine
from kvstore_bench.recompute.methods import Cell
from kvstore_bench.recompute.prompts import Prompt, Prompts
from kvstore_service.calibration import Report


@dataclass(frozen=True, slots=True)
class Judged:
    """Fidelity of one method at one ratio."""

    kl: float
    """KL from full recompute, nats per token of the question, mean over the prompts."""
    kl_most: float
    """The highest KL of a prompt."""
    top1: float
    """Share of the question's tokens with the same most likely next token."""


Fidelity = dict[tuple[str, str, float], Judged]
"""By kind of prompt, method and ratio."""


def judge(
    engine: Engine, prompts: Prompts, asked: Sequence[Prompt], cells: Sequence[Cell], report: Report
) -> Fidelity:
    """Measures fidelity for each prompt and cell. At ratio 0 and at ratio 1 all methods do the same, so these are
    measured once and count for all methods."""
    seen: dict[tuple[str, str, float], list[tuple[float, float]]] = {}
    for index, prompt in enumerate(asked):
        report.advance("judge", index, len(asked))
        engine.store(prompts, prompt)
        reference = engine.reference(prompt)
        at_bounds: dict[float, tuple[float, float]] = {}
        for cell in cells:
            if (compared := at_bounds.get(cell.ratio)) is None:
                compared = divergence(reference, engine.log_probabilities(prompt, cell.recompute))
                if cell.ratio in (0, 1):
                    at_bounds[cell.ratio] = compared
            seen.setdefault((prompt.kind, cell.method.name, cell.ratio), []).append(compared)
    report.advance("judge", len(asked), len(asked))
    return {key: _judged(values) for key, values in seen.items()}


def divergence(reference: torch.Tensor, predicted: torch.Tensor) -> tuple[float, float]:
    """KL in nats per token, and top-1 agreement. Both arguments are log-probabilities, f32 `[tokens, vocabulary]`."""
    kl = (reference.exp() * (reference - predicted)).sum(-1).mean()
    top1 = (reference.argmax(-1) == predicted.argmax(-1)).float().mean()
    return float(kl), float(top1)


def _judged(values: Sequence[tuple[float, float]]) -> Judged:
    kls = [kl for kl, _ in values]
    return Judged(statistics.fmean(kls), max(kls), statistics.fmean(top1 for _, top1 in values))
