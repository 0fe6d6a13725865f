"""Fits the small calibration of the demo, once per model and dtype, and caches it."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blake3 import blake3

from kvstore_client.cache_dir import default_cache_dir
from kvstore_codec.calibration import Calibration
from kvstore_codec.errors import CodecError, ConfigurationError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kvstore_client.engines.transformers.calibrate import ObservedModel

TOKENS = 8192
_PASSAGE_TOKENS = 1024
"""Shorter passages than those of `kvstore calibrate`. They take half the time, and coded KV is a few percent larger."""

_HELD_OUT = 2
"""Number of passages that quantisation steps are measured on."""


def demo_calibration(
    model: "PreTrainedModel", tokenizer: Any, progress: Callable[[str], None]
) -> tuple[Calibration, str]:
    """Returns a calibration, and a sentence for the user that says where it comes from: the cache, or a new fit, which
    takes about a minute on 2 cores.

    Casts the model to f32. Raises ConfigurationError when the cache folder cannot be written."""
    from kvstore_client.engines.transformers.calibrate import ObservedModel

    progress("hashing the model's weights")
    observed = ObservedModel(model)
    folder = default_cache_dir() / "demo" / observed.spec.digest.hex()[:16]
    cached = _cached(folder, observed)
    if cached is not None:
        return cached, "found a small calibration in the cache"
    started = time.monotonic()
    calibration = _fit(observed, tokenizer, progress)
    _write(folder, calibration)
    return (
        calibration,
        f"fitted a small calibration to {TOKENS:,} tokens in {time.monotonic() - started:.0f} s",
    )


def _cached(folder: Path, observed: "ObservedModel") -> Calibration | None:
    for path in folder.glob("*.kvcal"):
        try:
            data = path.read_bytes()
            if blake3(data).hexdigest() == path.stem:
                calibration = Calibration.from_bytes(data)
                calibration.require(observed.spec)
                return calibration
        except (OSError, CodecError):  # unreadable, or of an older version: fit a new one
            continue
    return None


def _fit(observed: "ObservedModel", tokenizer: Any, progress: Callable[[str], None]) -> Calibration:
    import torch

    from kvstore_bench.demo.document import calibration_text
    from kvstore_service.calibration import Options, calibrate, plan_passages

    ids = tokenizer(calibration_text(), add_special_tokens=False, verbose=False).input_ids
    plan = plan_passages([torch.tensor(ids)], TOKENS, _PASSAGE_TOKENS)
    plan = replace(plan, held_out=plan.held_out[:_HELD_OUT])
    return calibrate(
        observed, plan, Options(), _Messages(progress), provenance={"texts": ["pydoc_data.topics"]}
    )


def _write(folder: Path, calibration: Calibration) -> None:
    from kvstore_service.calibration import write_calibration

    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_calibration(calibration, folder / f"{calibration.digest.hex()}.kvcal")
    except OSError as error:
        raise ConfigurationError(
            f"cannot write the calibration to {folder}: {error.strerror}; "
            "set KVSTORE_CACHE_DIR to a writable folder"
        ) from error


class _Messages:
    """A calibration `Report` that turns each step into a message."""

    def __init__(self, progress: Callable[[str], None]) -> None:
        self._progress = progress

    def advance(self, stage: str, done: int, total: int) -> None:
        self._progress(f"fitting a small calibration (only once): {stage} {done}/{total}")

    def note(self, text: str) -> None:
        self._progress(text)
