"""Fits a Calibration to passages: gathers moments, fits transforms, and finds the quantiser steps."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from kvstore_client.engines.transformers.calibrate import ObservedModel
from kvstore_codec import canonical
from kvstore_codec.calibrate import Moments, error_metric, find_step, fit_periods, square_root
from kvstore_codec.calibration import Calibration
from kvstore_codec.encoding import Rate
from kvstore_codec.errors import CalibrationError
from kvstore_service.calibration.held_out import Damage, HeldOut
from kvstore_service.calibration.passages import Plan

RATES = {str(rate): rate.loss for rate in Rate if rate is not Rate.EXACT}
"""rate -> limit of the KL divergence, nats per token, for text similar to the calibration's"""
TARGET_SHARE = 0.75
"""Share of the limit that steps are chosen for. Other documents have a higher divergence than held-out text: SmolLM2
with steps chosen for .0049 and .0200 had .0057 and .0247 there."""
_EVALUATIONS = 8
_STATE_DOMAIN = b"kvstore.calibration.state.v1"


class Report(Protocol):
    """Receives the progress of a run."""

    def advance(self, stage: str, done: int, total: int) -> None: ...

    def note(self, text: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Options:
    """Parameters of a calibration."""

    period_layers: int = 4
    rank: int = 128
    """rank of the prediction from token embeddings; 0 means no prediction"""
    sinks: int = 4
    seed: int = 0
    """seed of the labels that are drawn to compute the Fisher scalars"""


def calibrate(
    observed: ObservedModel,
    plan: Plan,
    options: Options,
    report: Report,
    *,
    state: Path | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> Calibration:
    """Fits a calibration. The same input gives the same bytes on the same machine.

    `state` is a file from which an interrupted run resumes. It is not deleted, so that a run with another rank need not
    read the texts again. `provenance` is written into the calibration, together with the measurements. Raises
    CalibrationError.
    """
    moments = _gather(observed, plan, options, report, state)
    report.advance("fit", 0, 1)
    metric = error_metric(
        moments.query_covariance(), observed.output_weight(), moments.fisher(), observed.inverse_frequencies()
    )
    fitted = Calibration(
        observed.spec.digest,
        options.period_layers,
        options.sinks,
        {},
        {},
        fit_periods(moments, square_root(metric), options.rank),
    )
    report.advance("fit", 1, 1)
    found = _find_steps(observed, fitted, plan, report)
    return replace(
        fitted,
        steps={rate: step for rate, (step, _) in found.items()},
        errors={rate: damage.errors for rate, (_, damage) in found.items()},
        provenance={
            **(provenance or {}),
            "fitted_tokens": moments.tokens,
            "held_out_passages": len(plan.held_out),
            "context_tokens": len(plan.held_out[0].context),
            "continuation_tokens": len(plan.held_out[0].continuation),
            "rank": options.rank,
            "seed": options.seed,
            "kl": {rate: damage.kl for rate, (_, damage) in found.items()},
        },
    )


def _gather(
    observed: ObservedModel, plan: Plan, options: Options, report: Report, state: Path | None
) -> Moments:
    key = _state_key(observed, plan, options)
    moments = Moments.empty(
        layers=observed.spec.layers,
        period_layers=options.period_layers,
        kv_heads=observed.spec.kv_heads,
        head_dim=observed.spec.head_dim,
        features=2 * observed.hidden_size,
    )
    if state is not None and state.exists():
        moments = _resumed(state, key, report) or moments
    total = len(plan.fitted)
    for index in range(moments.texts, total):
        report.advance("read", index, total)
        passage = plan.fitted[index]
        text = observed.prefill(passage.context)
        keys, values = (part[:, :, options.sinks :] for part in (text.keys, text.values))
        moments.add_kv(keys, values, text.features[options.sinks :])
        moments.add_queries(text.queries)
        # A seed per passage, so that a resumed run draws the same labels as an uninterrupted one.
        generator = torch.Generator().manual_seed(options.seed + index)
        moments.add_fisher(observed.fisher(text, passage.continuation, generator, sinks=options.sinks))
        if state is not None:
            moments.save(state, key)
    report.advance("read", total, total)
    return moments


def _resumed(state: Path, key: str, report: Report) -> Moments | None:
    try:
        moments, found = Moments.load(state)
    except CalibrationError as error:
        report.note(f"starting over: {error}")
        return None
    if found != key:
        report.note(f"starting over: {state} belongs to another model, text or options")
        return None
    report.note(f"resuming from {state}: {moments.texts} passages are already read")
    return moments


def _state_key(observed: ObservedModel, plan: Plan, options: Options) -> str:
    """Digest of everything that the moments depend on. They do not depend on the rank."""
    numbers = (options.period_layers, options.sinks, options.seed)
    tokens = (part for passage in plan.fitted for part in (passage.context, passage.continuation))
    return canonical.digest(
        _STATE_DOMAIN,
        observed.spec.digest,
        *map(canonical.integer, numbers),
        *(part.cpu().to(torch.int64).numpy().tobytes() for part in tokens),
    ).hex()


def _find_steps(
    observed: ObservedModel, fitted: Calibration, plan: Plan, report: Report
) -> dict[str, tuple[float, Damage]]:
    total = len(plan.held_out) + _EVALUATIONS * len(RATES)
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        report.advance("measure", done, total)

    held_out = HeldOut(observed, fitted, plan.held_out, advance)
    largest = held_out.largest_step()
    measured: dict[float, Damage] = {}

    def kl(step: float) -> float:
        if step not in measured:
            measured[step] = held_out.measure(step)
        advance()
        return measured[step].kl

    found = {}
    for rate, limit in RATES.items():
        target = TARGET_SHARE * limit
        start = held_out.expected_step(target)
        if measured:  # a step already measured, moved along the slope of small errors
            nearest = min(measured, key=lambda step: abs(measured[step].kl - target))
            start = nearest * min(max(target / max(measured[nearest].kl, 1e-9), 0.25), 4.0) ** 0.5
        start = min(start, largest)
        step = find_step(kl, target, start=start, largest=largest, evaluations=_EVALUATIONS)
        found[rate] = (step, measured[step])
    report.advance("measure", total, total)
    return found
