"""Lossy encoding without a calibration: KV is rounded to integers with a uniform step, and the integers are coded.

In every frame, the mean over the frame's tokens is subtracted from each channel (K or V, layer, head, dimension).
Every (layer, K or V) has one step, the rate's fraction of the rms of the residual. A value is then

    x = (sample - 128 + mean) * step        sample 8 bits, mean a whole number of steps

so the integers are added exactly and rounded once, by one f32 product and the cast to the KV's dtype. Every
decoder returns the same bits. Integers beyond 8 bits are listed as escapes, never clipped.

    escapes u32 | step f32 [2, layers] | means i16 [2, layers, heads, dims], as words | escape index u32 [n] |
    escape value i32 [n] | coded samples

A byte coder codes the samples as one plane [2 * layers * heads * tokens, dims], a video coder as `token_frames`.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from kvstore_codec.coders import coder, decoder
from kvstore_codec.coders.hevc.base import HevcCoder
from kvstore_codec.encoding import Rate
from kvstore_codec.errors import ChunkFormatError
from kvstore_codec.layouts.token_frames import Samples, decode_token_frames, encode_token_frames
from kvstore_codec.payload import PayloadKind, PayloadReader, PayloadWriter
from kvstore_codec.scratch import ThreadScratch
from kvstore_codec.words import decode_words, encode_words

# Step / residual rms. The variance of the error is step^2 / 12.
STEP_PER_RMS = {Rate.HIGH: 0.18, Rate.MEDIUM: 0.36, Rate.LOW: 0.62}

_ZERO_SAMPLE = 128
_LARGEST_MEAN = (1 << 15) - 1 - 2 * _ZERO_SAMPLE
# Integers below this limit are exact in f32, so a product with the step rounds once. Within the limits of the step the
# product neither overflows nor loses bits to denormals.
_INTEGER_LIMIT = 1 << 23
_SMALLEST_STEP = float(np.finfo(np.float32).tiny) * _INTEGER_LIMIT
_LARGEST_STEP = float(np.finfo(np.float32).max) / (2 * _INTEGER_LIMIT)
# With a larger fraction of escapes the step does not fit the frame, and an exact frame is not larger.
_MOST_ESCAPES = 1 / 32

# Values beyond this multiple of the rms are outliers if the rms without them is less than half.
_OUTLIER = 6.0
_OUTLIER_ROUNDS = 4

_COUNT = struct.Struct("<I")
_MEANS, _SAMPLES, _SUMS, _FLOATS = (ThreadScratch() for _ in range(4))


@dataclass(frozen=True, slots=True)
class _Integers:
    """A quantised frame: samples u8 [2, layers, heads, tokens, dims], steps f32 [2, layers], means i16
    [2, layers, heads, dims], and the escapes."""

    steps: npt.NDArray[np.float32]
    means: npt.NDArray[np.int16]
    samples: Samples
    escape_indices: npt.NDArray[np.uint32]
    escape_values: npt.NDArray[np.int32]


def encode_quantised(
    keys: torch.Tensor, values: torch.Tensor, coder_name: str, step_per_rms: float
) -> bytes | None:
    """Encodes a frame. `keys` and `values` are [layers, heads, tokens, dims].

    Returns None for a frame that integers would damage: values that are not finite, or out of proportion to the
    rest (a channel that is huge but hardly varies, a layer without variation).
    """
    largest = float(torch.finfo(keys.dtype).max)
    found = _integers(torch.stack((keys, values)).float().numpy(), largest, step_per_rms)
    if found is None:
        return None
    writer = PayloadWriter(PayloadKind.QUANTISED)
    writer.add(_COUNT.pack(len(found.escape_indices)), found.steps.data)
    encode_words(found.means.view(np.uint16), writer)
    writer.add(found.escape_indices.data, found.escape_values.data)
    writer.add_coded(_encode_samples(found.samples, coder_name), found.samples)
    return writer.frame()


def decode_quantised(
    reader: PayloadReader, keys: torch.Tensor, values: torch.Tensor, coder_name: str
) -> None:
    """Decodes a frame into tensors of its shape with any strides. Raises ChunkFormatError or a subclass."""
    shape = (2, *keys.shape)
    layers, heads, _, dims = keys.shape
    size = 2 * keys.numel()
    (escapes,) = reader.unpack(_COUNT)
    if escapes > size:
        raise ChunkFormatError(f"a frame of {size} values lists {escapes} escapes")
    steps = np.frombuffer(reader.take(4 * 2 * layers), "<f4").reshape(2, layers, 1, 1, 1)
    means = _MEANS.array((2, layers, heads, 1, dims), np.uint16)
    decode_words(reader, means)
    indices = np.frombuffer(reader.take(4 * escapes), "<u4")
    integers = np.frombuffer(reader.take(4 * escapes), "<i4")
    if escapes and int(indices.max()) >= size:
        raise ChunkFormatError(f"a frame of {size} values has an escape at {int(indices.max())}")
    if not _usable(steps) or np.abs(integers, dtype=np.int64).max(initial=0) > _INTEGER_LIMIT + _LARGEST_MEAN:
        raise ChunkFormatError("a frame has steps or escapes that no encoder writes")
    samples = _SAMPLES.array(shape, np.uint8)
    _decode_samples(reader.take_rest(), samples, coder_name)
    reader.decoded(samples)
    reader.finish()  # verifies the samples before anything is written to the caller's tensors

    offsets = means.view(np.int16)
    offsets -= _ZERO_SAMPLE
    sums = _SUMS.array(shape, np.int16)
    np.add(samples, offsets, out=sums, dtype=np.int16)
    floats = _FLOATS.array(shape, np.float32)
    np.multiply(sums, steps, out=floats, dtype=np.float32)
    if escapes:
        at = np.unravel_index(indices, shape)
        exact = integers + (offsets[at[0], at[1], at[2], 0, at[4]].astype(np.int32) + _ZERO_SAMPLE)
        floats[at] = exact.astype(np.float32) * steps[at[0], at[1], 0, 0, 0]
    for out, restored in zip((keys, values), floats, strict=True):
        out.copy_(torch.from_numpy(restored))


def _encode_samples(samples: Samples, coder_name: str) -> bytes:
    chosen = coder(coder_name)
    if isinstance(chosen, HevcCoder):
        return encode_token_frames(samples.reshape(-1, *samples.shape[2:]), chosen)
    return chosen.encode(samples.reshape(-1, samples.shape[-1]))


def _decode_samples(data: memoryview, out: Samples, coder_name: str) -> None:
    chosen = decoder(coder_name)
    if isinstance(chosen, HevcCoder):
        decode_token_frames(data, chosen, out.reshape(-1, *out.shape[2:]))
    else:
        chosen.decode(data, out.reshape(-1, out.shape[-1]))


def _integers(x: npt.NDArray[np.float32], largest: float, step_per_rms: float) -> _Integers | None:
    """Quantises `x`, [2, layers, heads, tokens, dims]. `largest` is the largest finite number of the KV's dtype."""
    # Overflows give numbers that are not finite, which the checks below detect.
    with np.errstate(all="ignore"):
        means = x.mean(axis=3, keepdims=True)
        rms = _rms(x - means)
        steps = (step_per_rms * rms).astype(np.float32)
        if not _usable(steps):
            return None
        whole = np.rint(x / steps)
        whole_means = np.rint(means / steps)
        peak = np.abs(whole).max(axis=(2, 3, 4), keepdims=True)
        fits = (
            peak.max() < _INTEGER_LIMIT
            and np.abs(whole_means).max() <= _LARGEST_MEAN
            and (peak * steps).max() <= largest
        )
    if not fits:
        return None
    residual = (whole - whole_means).astype(np.int32)
    escape_indices = np.flatnonzero((residual < -_ZERO_SAMPLE) | (residual >= _ZERO_SAMPLE))
    if escape_indices.size > _MOST_ESCAPES * residual.size:
        return None
    return _Integers(
        steps=steps,
        means=np.ascontiguousarray(whole_means.astype(np.int16)),
        samples=(residual.clip(-_ZERO_SAMPLE, _ZERO_SAMPLE - 1) + _ZERO_SAMPLE).astype(np.uint8),
        escape_indices=escape_indices.astype(np.uint32),
        escape_values=residual.reshape(-1)[escape_indices],
    )


def _rms(residual: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Rms per layer, [2, layers, 1, 1, 1], without outliers if they dominate it; these become escapes."""
    squares = np.square(residual)
    mean = squares.mean(axis=(2, 3, 4), keepdims=True)
    for _ in range(_OUTLIER_ROUNDS):  # an outlier shifts its channel's mean, which creates smaller outliers
        without = np.where(squares <= _OUTLIER**2 * mean, squares, 0).mean(axis=(2, 3, 4), keepdims=True)
        mean = np.where(without < mean / 4, without, mean)
    rms: npt.NDArray[np.float32] = np.sqrt(mean)
    return rms


def _usable(steps: npt.NDArray[np.float32]) -> bool:
    """Whether all steps are within the limits; False for NaN."""
    return bool(steps.min() >= _SMALLEST_STEP and steps.max() <= _LARGEST_STEP)
