"""Frames of KLT coefficients: 64 tokens x one period as a plane of 8-bit samples, most important rows first.

    step f32 | coefficients u16 | exact tokens u16 | escapes u32 | exact token index u16 [n] | escape index u32 [m] |
    escape value i32 [m] | K and V of the exact tokens, as words | coded plane [coefficients, tokens]

A sample is 128 + the integer. Integers outside 8 bits are listed as escapes, never clipped. Rows beyond the last one
that is not all zero are not coded. Every frame says its own step: where text is unlike the calibration's, the guard
has made it finer.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from kvstore_codec.calibration import Calibration
from kvstore_codec.coders import Plane, coder
from kvstore_codec.errors import CalibrationError, ChunkFormatError, InvalidKVError
from kvstore_codec.klt import Coefficients, PeriodKLT
from kvstore_codec.payload import PayloadReader
from kvstore_codec.scratch import ThreadScratch
from kvstore_codec.words import decode_words, encode_words, words_of

# A frame may have this much more error than the calibration text has on average; beyond it the step is refined.
# Frames of ordinary text vary by about as much.
GUARD_SLACK = 1.25
# The error grows with the step squared, less where rows are zero already: a few attempts always suffice, or the KV is
# nothing a calibration foresaw.
_GUARD_ATTEMPTS = 6
_ZERO_SAMPLE = 128
_LARGEST_INTEGER = 1 << 23  # exact in f32

_FRAME = struct.Struct("<fHHI")
_TOKEN_DTYPE, _INDEX_DTYPE, _VALUE_DTYPE = np.dtype("<u2"), np.dtype("<u4"), np.dtype("<i4")

_scratch = ThreadScratch()


class KLT:
    """A calibration made ready for coding. Thread-safe; build it once and keep it."""

    def __init__(self, calibration: Calibration) -> None:
        self.calibration = calibration
        self.periods = [PeriodKLT(period) for period in calibration.periods]

    def target(self, rate: str) -> Target:
        """Raises CalibrationError for a rate that the calibration found no step for."""
        if rate not in self.calibration.steps:
            known = ", ".join(self.calibration.steps) or "none"
            raise CalibrationError(f"the calibration has no step for rate {rate!r}; it has {known}")
        return Target(self.calibration.steps[rate], GUARD_SLACK * self.calibration.errors[rate])


@dataclass(frozen=True, slots=True)
class Target:
    """What a frame is to be coded to."""

    step: float
    error: float
    """mean squared error per value in the metric that the guard tolerates; infinity turns the guard off"""


def encode_klt_frame(
    keys: torch.Tensor,
    values: torch.Tensor,
    features: torch.Tensor,
    klt: PeriodKLT,
    target: Target,
    exact_tokens: Sequence[int],
    coder_name: str,
) -> list[bytes] | None:
    """`keys` and `values` are [layers, heads, tokens, dim] in host memory, `features` f32 [tokens, features].

    Returns the frame's parts, or None for KV that only an exact frame keeps: NaN, infinities, or error that no step
    brings down.
    """
    found = klt.analyse(klt.gather(keys, values), features)
    if not bool(found.values.isfinite().all()):
        return None
    for tensor in (found.values, found.white):
        tensor[list(exact_tokens)] = 0
    quantised = _guarded(klt, found, target.error * (keys.shape[2] - len(exact_tokens)), target.step)
    if quantised is None:
        return None
    step, integers = quantised
    used = integers.any(0).nonzero()
    count = int(used[-1]) + 1 if len(used) else 0
    plane = integers[:, :count].T.contiguous().to(torch.int32).numpy()
    outside = np.flatnonzero((plane < -_ZERO_SAMPLE) | (plane >= _ZERO_SAMPLE))
    escapes = plane.reshape(-1)[outside]
    plane.reshape(-1)[outside] = 0
    samples: Plane = (plane + _ZERO_SAMPLE).astype(np.uint8)
    parts = [
        _FRAME.pack(step, count, len(exact_tokens), len(outside)),
        np.asarray(exact_tokens, _TOKEN_DTYPE).tobytes(),
        outside.astype(_INDEX_DTYPE).tobytes(),
        escapes.astype(_VALUE_DTYPE).tobytes(),
    ]
    if exact_tokens:
        chosen = torch.as_tensor(exact_tokens)
        for tensor in (keys, values):
            parts += encode_words(words_of(tensor.index_select(2, chosen).contiguous()))
    if samples.size:
        parts.append(coder(coder_name).encode(samples))
    return parts


def decode_klt_frame(
    reader: PayloadReader,
    out_keys: torch.Tensor,
    out_values: torch.Tensor,
    features: torch.Tensor,
    klt: PeriodKLT,
    coder_name: str,
) -> None:
    """The inverse, into [layers, heads, tokens, dim] tensors. Raises ChunkFormatError for bytes that are no frame."""
    tokens = out_keys.shape[2]
    step, count, exact, escaped = reader.unpack(_FRAME)
    if not (0 < step < np.inf) or count > klt.transform.columns or exact > tokens or escaped > count * tokens:
        raise ChunkFormatError(
            f"a frame of {count} coefficients, {exact} exact tokens and {escaped} escapes with step {step} is absurd"
        )
    exact_tokens = _increasing(reader, _TOKEN_DTYPE, exact, tokens)
    index = _increasing(reader, _INDEX_DTYPE, escaped, count * tokens)
    escapes = np.frombuffer(reader.take(escaped * _VALUE_DTYPE.itemsize), _VALUE_DTYPE)
    if len(escapes) and int(np.abs(escapes.astype(np.int64)).max()) > _LARGEST_INTEGER:
        raise ChunkFormatError("a frame escapes to integers that no KV has")
    kept: list[torch.Tensor] = []
    for out in (out_keys, out_values) if exact else ():
        tensor = torch.empty((*out.shape[:2], exact, out.shape[3]), dtype=out.dtype)
        decode_words(reader, words_of(tensor))
        kept.append(tensor)
    integers = torch.from_numpy(_integers(reader, coder_name, count, tokens, index, escapes))
    klt.scatter_(klt.synthesise(integers.T, features, step), out_keys, out_values)
    chosen = torch.from_numpy(exact_tokens.astype(np.int64))
    for out, tensor in zip((out_keys, out_values), kept, strict=False):
        out.index_copy_(2, chosen, tensor)


def _guarded(
    klt: PeriodKLT, found: Coefficients, error_per_value: float, step: float
) -> tuple[float, torch.Tensor] | None:
    """A step, at most the one given, with no more than that error, summed over tokens; and the integers it makes."""
    limit = error_per_value * klt.transform.values
    lost = klt.error(found, found.values)
    for _ in range(_GUARD_ATTEMPTS):
        step = float(np.float32(step))  # as it will be read
        integers = (found.values / step).round_()
        error = klt.error(found, integers * step)
        if error <= limit:
            fits = not integers.numel() or float(integers.abs().max()) <= _LARGEST_INTEGER
            return (step, integers) if fits else None
        if lost >= limit:
            return None
        step *= 0.9 * ((limit - lost) / max(error - lost, limit)) ** 0.5
    return None


def _integers(
    reader: PayloadReader,
    coder_name: str,
    count: int,
    tokens: int,
    index: npt.NDArray[np.unsignedinteger],
    escapes: npt.NDArray[np.signedinteger],
) -> npt.NDArray[np.float32]:
    """f32 [count, tokens]"""
    samples = _scratch.array((count, tokens), np.uint8)
    if samples.size:
        coder(coder_name).decode(reader.take_rest(), samples)
    integers: npt.NDArray[np.float32] = samples.astype(np.float32)
    integers -= _ZERO_SAMPLE
    integers.reshape(-1)[index] = escapes
    return integers


def _increasing(
    reader: PayloadReader, dtype: np.dtype[np.unsignedinteger], count: int, limit: int
) -> npt.NDArray[np.unsignedinteger]:
    """`count` indices below `limit`, each larger than the one before."""
    index: npt.NDArray[np.unsignedinteger] = np.frombuffer(reader.take(count * dtype.itemsize), dtype)
    if count and (int(index[-1]) >= limit or bool((index[1:] <= index[:-1]).any())):
        raise ChunkFormatError(f"a frame's list of {count} indices below {limit} is not increasing")
    return index


def require_features(features: torch.Tensor | None, tokens: int, calibration: Calibration) -> torch.Tensor:
    """Raises InvalidKVError unless these are the features of `tokens` tokens."""
    if features is None or tuple(features.shape) != (tokens, calibration.features):
        shape = None if features is None else list(features.shape)
        raise InvalidKVError(
            f"this calibration predicts from features [{tokens}, {calibration.features}], got {shape}; "
            "make them with token_features from the model's input embeddings"
        )
    return features.float()
