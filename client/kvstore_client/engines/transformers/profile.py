"""Profile of a model on this machine: measured once, then kept on disk."""

import logging
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import DynamicCache, PreTrainedModel

from kvstore_client.engines.transformers.decode_speed import EncodedSample, SampleChunk, measure_interference
from kvstore_client.engines.transformers.prefill_speed import PrefillSpeed
from kvstore_client.planning.profile import CodecCost, Profile, ProfileStore, profile_key
from kvstore_codec.encoding import Encoding
from kvstore_codec.errors import CodecError
from kvstore_codec.klt_frames import KLT
from kvstore_codec.model_spec import ModelSpec

_LIBRARIES = ("kvstore-service", "torch", "transformers", "av", "pcodec", "zstandard")
_BUDGET_S = 8.0
"""Approximate time that a worker's first use may spend on measuring, seconds."""

_BUSY, _QUIET = 1.5, 0.75
"""Load per core, in runnable processes. A profile measured on a busy machine is measured again on a quiet one."""

_CPUINFO = Path("/proc/cpuinfo")

log = logging.getLogger(__name__)


def machine_of(model: PreTrainedModel) -> dict[str, str | int]:
    """What the speed of `model` in this process depends on, apart from the model."""
    device = model.device
    return {
        "processor": _processor(),
        "cores": _cores(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch_threads": torch.get_num_threads(),
        "attention": str(model.config._attn_implementation),
        **{name: version(name) for name in _LIBRARIES},
    }


def profile_of(
    model: PreTrainedModel,
    spec: ModelSpec,
    encodings: Sequence[str],
    klt: KLT | None,
    store: ProfileStore,
    *,
    decode_threads: int,
) -> Profile:
    """The kept profile, extended by measurements of the missing `encodings`; the first measurement takes seconds.
    Encodings that cannot be measured here (no calibration, no coder) are left out.

    A profile that cannot be kept on disk is used anyway, and a warning is logged.
    """
    key = profile_key(spec, machine_of(model))
    known = store.load(key)
    if known is not None and known.provenance.get("load_per_core", 0.0) > _BUSY and _load_per_core() < _QUIET:
        known = None
    missing = [name for name in encodings if known is None or name not in known.codecs]
    if known is not None and not any(_measurable(name, klt) for name in missing):
        return replace(known, decode_threads=decode_threads)
    profile = measure_profile(model, spec, missing, klt, decode_threads=decode_threads, known=known)
    try:
        store.save(key, profile)
    except OSError as error:
        log.warning(
            "the profile of %s cannot be kept (%s), so every process measures it again; "
            "set KVSTORE_CACHE_DIR to a writable folder",
            spec.model_id, error,
        )  # fmt: skip
    return profile


@torch.inference_mode()
def measure_profile(
    model: PreTrainedModel,
    spec: ModelSpec,
    encodings: Sequence[str],
    klt: KLT | None = None,
    *,
    decode_threads: int,
    known: Profile | None = None,
    budget_s: float = _BUDGET_S,
) -> Profile:
    """Measure forward passes, decoding and restoring in each of `encodings`, and how they slow each other. `known`
    provides other encodings' costs. Nothing else should compute meanwhile.

    No further encoding is measured after `budget_s`; the costs of similar ones are used for those left out.
    """
    begin_s, load = time.perf_counter(), _load_per_core()
    speed = PrefillSpeed(model)
    prefill = speed.measure()
    log.info(
        "profile of %s: %.0f tokens/s prefill", spec.model_id, 1 / max(prefill.seconds(0, 1024) / 1024, 1e-9)
    )
    sample = SampleChunk(model, spec, speed)
    codecs: dict[str, CodecCost] = dict(known.codecs) if known is not None else {}
    slowest: tuple[float, EncodedSample] | None = None
    for name in encodings:
        if not _measurable(name, klt):
            continue
        if slowest is not None and time.perf_counter() - begin_s > budget_s:
            log.warning("profile of %s: no time left to measure %s", spec.model_id, name)
            continue
        try:
            encoded = sample.encode(Encoding.parse(name), klt)
            cost = encoded.measure()
        except CodecError as error:
            log.warning("profile of %s: %s cannot be measured: %s", spec.model_id, name, error)
            continue
        codecs[name] = cost
        sample_s = (cost.decode_s + cost.restore_s) * sample.tokens
        log.info("profile of %s: %s decodes %.0f tokens/s", spec.model_id, name, sample.tokens / sample_s)
        if slowest is None or sample_s > slowest[0]:
            slowest = sample_s, encoded
    interference = known.interference if known is not None else 1.0
    if slowest is not None and time.perf_counter() - begin_s <= budget_s:
        interference = measure_interference(
            slowest[1], slowest[0], lambda: speed.timed(DynamicCache(), speed.long_tokens // 2).seconds
        )
    seconds = time.perf_counter() - begin_s
    log.info("profile of %s: measured in %.1f s", spec.model_id, seconds)
    provenance = {
        "model": spec.model_id,
        "dtype": str(spec.dtype),
        "kv_bytes_per_token": spec.kv_bytes_per_token,
        "machine": machine_of(model),
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "took_s": round(seconds, 1),
        "load_per_core": round(load, 2),
    }
    return Profile(codecs, prefill, interference, decode_threads, provenance)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _load_per_core() -> float:
    return os.getloadavg()[0] / _cores() if hasattr(os, "getloadavg") else 0.0


def _measurable(name: str, klt: KLT | None) -> bool:
    return klt is not None or not Encoding.parse(name).needs_calibration


def _processor() -> str:
    for line in _CPUINFO.read_text().splitlines() if _CPUINFO.exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
