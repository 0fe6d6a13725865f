"""How far what the model says of a question over reused documents is from what it says over computed ones."""

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
    kl: float
    """from full recompute, nats a token of the question, mean of the prompts"""
    kl_most: float
    """of the prompt with the highest"""
    top1: float
    """share of the question's tokens whose likeliest successor is the same"""


Fidelity = dict[tuple[str, str, float], Judged]
"""By kind of prompt, method and ratio."""


def judge(
    engine: Engine, prompts: Prompts, asked: Sequence[Prompt], cells: Sequence[Cell], report: Report
) -> Fidelity:
    """Nothing is chosen at ratio 0, and nothing left out at 1: these are measured with one method, for all."""
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


def divergence(reference: torch.Tensor, said: torch.Tensor) -> tuple[float, float]:
    """KL and top-1 agreement of log-probabilities, f32 `[tokens, vocabulary]` each."""
    kl = (reference.exp() * (reference - said)).sum(-1).mean()
    top1 = (reference.argmax(-1) == said.argmax(-1)).float().mean()
    return float(kl), float(top1)


def _judged(values: Sequence[tuple[float, float]]) -> Judged:
    kls = [kl for kl, _ in values]
    return Judged(statistics.fmean(kls), max(kls), statistics.fmean(top1 for _, top1 in values))
