"""Runs the codec benchmark: bits, fidelity and speed of encodings of a real model's KV, on text that the calibration
was not fitted to."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from kvstore_bench.codec import cachegen
from kvstore_bench.codec.calibration import default_calibration, read_calibration, seen_digests
from kvstore_bench.codec.fidelity import Passage, judge, observe
from kvstore_bench.codec.methods import (
    OUT_OF_DOMAIN_ROWS,
    is_cachegen,
    method_named,
    needs_calibration,
    require_rows,
)
from kvstore_bench.codec.rows import frame_overheads, out_of_domain_row, row_of
from kvstore_bench.codec.texts import (
    ESSAYS_INSTALL,
    Excerpt,
    Source,
    default_sources,
    excerpts,
    has_essays,
    read_source,
    require_unseen,
    split,
    unlike_calibration,
)
from kvstore_client.engines.transformers.calibrate import ObservedModel
from kvstore_codec.calibration import Calibration
from kvstore_codec.errors import ConfigurationError
from kvstore_codec.klt_frames import KLT
from kvstore_service.calibration import Report
from kvstore_service.models import load_smollm2


@dataclass(frozen=True, slots=True)
class Options:
    rows: Sequence[str]
    text: Sequence[Path] = ()
    """text to measure on instead of the default"""
    calibration: Path | None = None
    passages: int = 2
    """number of passages from each text"""
    out_of_domain: bool = True
    quick: bool = False


@dataclass(frozen=True, slots=True)
class Result:
    meta: dict[str, Any]
    rows: list[dict[str, Any]]
    frame_overhead: list[dict[str, Any]]
    out_of_domain: list[dict[str, Any]]


def run(options: Options, report: Report) -> Result:
    """Runs the benchmark. Raises ConfigurationError for texts, calibrations or rows that cannot be measured."""
    names = _possible_rows(options.rows, report)
    if options.calibration is not None and not options.text:
        raise ConfigurationError(
            "the given calibration may have been fitted to the default text; give other text with --text"
        )
    torch.manual_seed(0)
    model, tokenizer = load_smollm2(torch.bfloat16)
    observed = ObservedModel(model)
    measured, learnt = _sources(options, report)
    pieces = list(_pieces(measured, tokenizer, options))
    calibration: Calibration | None = None
    if options.out_of_domain or any(map(needs_calibration, names)):
        calibration = (
            read_calibration(options.calibration, observed)
            if options.calibration
            else default_calibration(observed, tokenizer, learnt, report, quick=options.quick)
        )
        require_unseen(measured, seen_digests(calibration))
    klt = KLT(calibration) if calibration else None
    passages = list(_observed(observed, pieces, report))
    rows = []
    for index, name in enumerate(names):
        report.advance("rows", index, len(names))
        method = method_named(name, observed, klt)
        coded, judged = [], []
        for passage, part in zip(passages, method.code(passages), strict=True):
            judged.append(judge(observed, passage, part.keys, part.values))
            coded.append(part)
        rows.append(row_of(method, passages, coded, judged))
    report.advance("rows", len(names), len(names))
    unlike = list(_out_of_domain(observed, klt, tokenizer, options, report)) if options.out_of_domain else []
    return Result(
        _meta(observed, calibration, measured, pieces, options), rows, frame_overheads(rows), unlike
    )


def _possible_rows(names: Sequence[str], report: Report) -> list[str]:
    """The names, without rows of a peer that is not installed."""
    require_rows(names)
    if cachegen.installed() or not any(map(is_cachegen, names)):
        return list(names)
    report.note(
        f"LMCache's CacheGen is not installed, so its rows are left out; install it with: {cachegen.INSTALL}"
    )
    left = [name for name in names if not is_cachegen(name)]
    require_rows(left)
    return left


def _sources(options: Options, report: Report) -> tuple[list[Source], list[Source]]:
    """Sources to measure on, and sources to calibrate on."""
    halves = [split(source) for source in default_sources()]
    if options.text:
        return [read_source(path) for path in options.text], [learnt for _, learnt in halves]
    if not has_essays():
        report.note(f"the second text is docstrings; to measure on essays instead: {ESSAYS_INSTALL}")
    return [measured for measured, _ in halves], [learnt for _, learnt in halves]


def _pieces(sources: Sequence[Source], tokenizer: Any, options: Options) -> Iterator[Excerpt]:
    if options.quick:
        yield from excerpts(sources[0], tokenizer, 1)
        return
    yield from chain(*(excerpts(source, tokenizer, options.passages) for source in sources))


def _observed(observed: ObservedModel, pieces: Sequence[Excerpt], report: Report) -> Iterator[Passage]:
    for index, piece in enumerate(pieces):
        report.advance("prefill", index, len(pieces))
        yield observe(observed, piece)
    report.advance("prefill", len(pieces), len(pieces))


def _out_of_domain(
    observed: ObservedModel, klt: KLT | None, tokenizer: Any, options: Options, report: Report
) -> Iterator[dict[str, Any]]:
    texts = unlike_calibration(tokenizer)[: 1 if options.quick else None]
    names = OUT_OF_DOMAIN_ROWS[: 1 if options.quick else None]
    for index, piece in enumerate(texts):
        report.advance("unlike", index, len(texts))
        passage = observe(observed, piece)
        for name in names:
            method = method_named(name, observed, klt)
            for part in method.code([passage]):
                judged = judge(observed, passage, part.keys, part.values)
                yield out_of_domain_row(method, passage, part, judged)
    report.advance("unlike", len(texts), len(texts))


def _meta(
    observed: ObservedModel,
    calibration: Calibration | None,
    measured: Sequence[Source],
    pieces: Sequence[Excerpt],
    options: Options,
) -> dict[str, Any]:
    facts = calibration.provenance if calibration else {}
    return {
        "model": "SmolLM2-135M-Instruct",
        "dtype": str(observed.spec.dtype),
        "passages": [
            {"text": piece.source, "context": len(piece.context), "continuation": len(piece.continuation)}
            for piece in pieces
        ],
        "measured_on": {
            source.name: [document.digest for document in source.documents] for source in measured
        },
        "calibration": calibration
        and {
            "blake3": calibration.digest.hex(),
            "fitted_tokens": facts.get("fitted_tokens"),
            "held_out_kl": facts.get("kl"),
            "steps": dict(calibration.steps),
        },
        "quick": options.quick,
        "threads": 1,
        "speed": "MB (1e6 bytes) of the KV in the model's dtype per second; decode: bytes to integers, restore: "
        "integers to KV; medians over chunks (CacheGen: over passages), and interquartile ranges",
    }
