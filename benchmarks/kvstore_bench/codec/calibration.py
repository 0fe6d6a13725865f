"""The calibration for measuring rates with a KLT: given by the user, cached, or newly fitted."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from kvstore_bench.codec.texts import Source, tokens_of
from kvstore_client.cache_dir import default_cache_dir
from kvstore_client.engines.transformers.calibrate import ObservedModel
from kvstore_codec import canonical
from kvstore_codec.calibration import VERSION, Calibration
from kvstore_codec.errors import ConfigurationError
from kvstore_service.calibration import (
    RATES,
    TARGET_SHARE,
    Options,
    Report,
    calibrate,
    plan_passages,
    write_calibration,
)

TOKENS = 24_576
QUICK_TOKENS = 2_048
_OPTIONS = Options()
_DOMAIN = b"kvstore.bench.calibration.v1"
# `plan_passages` makes shorter passages from shorter texts, and those are enough for a quick run.
_QUICK_TEXT_TOKENS = 6 * 608


def read_calibration(path: Path, observed: ObservedModel) -> Calibration:
    """Reads a calibration. Raises ConfigurationError for an unreadable file, and CalibrationError for one of another
    model."""
    try:
        calibration = Calibration.from_bytes(path.read_bytes())
    except OSError as error:
        raise ConfigurationError(f"cannot read the calibration {path.name}: {error.strerror}") from error
    calibration.require(observed.spec)
    return calibration


def default_calibration(
    observed: ObservedModel, tokenizer: Any, sources: Sequence[Source], report: Report, *, quick: bool
) -> Calibration:
    """A calibration fitted to `sources`, cached under a digest of everything it depends on. An interrupted run resumes.
    `quick` fits a small calibration, unless the full one is cached."""
    proper = _file(observed, sources, TOKENS)
    path = _file(observed, sources, QUICK_TOKENS) if quick and not proper.exists() else proper
    if not path.exists():
        tokens = [tokens_of(source, tokenizer) for source in sources]
        if quick:
            tokens = [torch.cat([text[: _QUICK_TEXT_TOKENS // len(tokens)] for text in tokens])]
        _make(observed, sources, tokens, QUICK_TOKENS if quick else TOKENS, path, report)
    return read_calibration(path, observed)


def _file(observed: ObservedModel, sources: Sequence[Source], tokens: int) -> Path:
    name = canonical.digest(
        _DOMAIN,
        observed.spec.digest,
        json.dumps([VERSION, tokens, asdict(_OPTIONS), RATES, TARGET_SHARE], sort_keys=True).encode(),
        *(document.digest.encode() for source in sources for document in source.documents),
    ).hex()[:32]
    return default_cache_dir() / "bench" / f"{name}.kvcal"


def _make(
    observed: ObservedModel,
    sources: Sequence[Source],
    texts: Sequence[torch.Tensor],
    tokens: int,
    path: Path,
    report: Report,
) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(
            f"cannot create {path.parent}: {error.strerror}; set KVSTORE_CACHE_DIR to a writable folder"
        ) from error
    state = path.with_suffix(".state")
    calibration = calibrate(
        observed,
        plan_passages(texts, tokens, observed.longest_text),
        _OPTIONS,
        report,
        state=state,
        provenance={
            "model": observed.spec.model_id,
            "texts": [
                {"name": f"{source.name}: {document.name}", "blake3": document.digest}
                for source in sources
                for document in source.documents
            ],
        },
    )
    write_calibration(calibration, path)
    state.unlink(missing_ok=True)


def seen_digests(calibration: Calibration) -> set[str]:
    """Digests (blake3, hex) of the documents that a calibration was fitted to."""
    return {text["blake3"] for text in calibration.provenance.get("texts", ())}
