"""Frames of KLT coefficients: 64 tokens x one period as a plane of 8-bit samples, most important rows first.

    step f32 | coefficients u16 | exact tokens u16 | escapes u32 | exact token index u16 [n] | escape index u32 [m] |
    escape value i32 [m] | K and V of the exact tokens, as words | coded plane [coefficients, tokens]

A sample is 128 + the integer. Integers outside 8 bits are listed as escapes, never clipped. Rows at the end whose few
ones add next to nothing are not coded: without them there are 1.5 times fewer to decode and to multiply. Every frame
says its own step: where text is unlike the calibration's, the guard has made it finer.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from kvstore_codec.calibration import Calibration
from kvstore_codec.coders import Plane, coder, decoder
from kvstore_codec.encoding import LARGEST_STEP, SMALLEST_STEP, Rate
from kvstore_codec.errors import CalibrationError, ChunkFormatError, InvalidKVError
from kvstore_codec.guard import LARGEST_INTEGER, Target, at_finer_step, at_step
from kvstore_codec.klt import PeriodKLT, compute_dtype, token_vectors
from kvstore_codec.payload import PayloadReader
from kvstore_codec.scratch import ThreadScratch
from kvstore_codec.words import decode_words, encode_words, words_of

# Coefficients with this share of the step as their deviation are rounded to zero but for one in thousands.
_SELDOM_ROUNDED_UP = 1 / 8
# Frames are restored with a multiple of so many columns: a product of new sizes costs six times one of known ones,
# because oneDNN compiles a kernel for it.
_COLUMNS_AT_ONCE = 64
# A product in bfloat16 may round up by 2^-8.
_CLOSE_TO_INFINITY = 1 - 2**-7
_ZERO_SAMPLE = 128

_FRAME = struct.Struct("<fHHI")
_TOKEN_DTYPE, _INDEX_DTYPE, _VALUE_DTYPE = np.dtype("<u2"), np.dtype("<u4"), np.dtype("<i4")

_SAMPLES, _FLOATS = ThreadScratch(), ThreadScratch()


class KLT:
    """A calibration made ready for coding. Thread-safe; build it once and keep it."""

    def __init__(self, calibration: Calibration) -> None:
        self.calibration = calibration
        self.periods = [PeriodKLT(period) for period in calibration.periods]
        predictors = [period.predictor_in for period in calibration.periods]
        self._predicting = torch.cat(predictors, dim=1).to(compute_dtype())

    def predict(self, features: torch.Tensor) -> Prediction:
        """What is known of a chunk before a byte of it has come, from its `token_features` [tokens, features].

        Raises InvalidKVError for features of another shape."""
        if features.ndim != 2 or features.shape[1] != self.calibration.features:
            raise InvalidKVError(
                f"this calibration predicts from features [tokens, {self.calibration.features}], got "
                f"{list(features.shape)}; make them with token_features from the model's input embeddings"
            )
        low = features.to(self._predicting) @ self._predicting
        return Prediction(torch.split(low, [period.rank for period in self.periods], dim=1))

    def target(self, rate: Rate | float, period: int) -> Target:
        """Raises CalibrationError for a rate that the calibration found no step for."""
        if not isinstance(rate, Rate):
            return Target(rate, math.inf)
        if rate not in self.calibration.steps:
            known = ", ".join(self.calibration.steps) or "none"
            raise CalibrationError(f"the calibration has no step for rate {rate!r}; it has {known}")
        return Target(self.calibration.steps[rate], self.calibration.errors[rate][period])


@dataclass(frozen=True, slots=True)
class Prediction:
    """Features brought down to the rank of each period's predictor: what encoding and decoding a chunk start from."""

    low: tuple[torch.Tensor, ...]
    """of each period, [tokens, rank]"""

    @property
    def tokens(self) -> int:
        return len(self.low[0])

    def at(self, period: int, tokens: slice) -> torch.Tensor:
        return self.low[period][tokens]


@dataclass(frozen=True, slots=True)
class EncodedFrame:
    parts: list[bytes]
    guarded: bool
    """The step is finer than the rate's."""


def encode_klt_frame(
    keys: torch.Tensor,
    values: torch.Tensor,
    low: torch.Tensor,
    klt: PeriodKLT,
    target: Target,
    exact_tokens: Sequence[int],
    coder_name: str,
) -> EncodedFrame | None:
    """`keys` and `values` are [layers, heads, tokens, dim] in host memory, `low` [tokens, rank] of the Prediction.

    None for KV that only an exact frame keeps: NaN, infinities and what may be rounded up to them, or error that no
    step brings down.
    """
    largest = max(float(keys.abs().max()), float(values.abs().max()))
    if not largest <= _CLOSE_TO_INFINITY * torch.finfo(keys.dtype).max:
        return None
    rows = token_vectors(keys, values)
    inexact = klt.transform.values * (len(rows) - len(exact_tokens))
    every = klt.transform.columns
    # Text like the calibration's needs few columns, and a third of the work; other text needs all of them.
    few = klt.columns_above(target.step * _SELDOM_ROUNDED_UP) if target.error < math.inf else every
    rounded = None
    for columns in dict.fromkeys((few, every)):
        found = klt.analyse(rows, low, columns)
        if not bool(found.values.isfinite().all()):
            return None
        for tensor in (found.values, found.lost):
            tensor[list(exact_tokens)] = 0
        rounded = at_step(found, target, inexact)
        if rounded is not None:
            break
    rounded = rounded or at_finer_step(found, target, inexact)
    if rounded is None:
        return None
    step, integers = rounded.step, rounded.integers
    count = integers.shape[1]
    plane = integers.T.contiguous().to(torch.int32).numpy()
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
    return EncodedFrame(parts, step < target.step)


class DecodedFrames:
    """Neighbouring frames of one period on their way back: integers first, then all of them restored at once."""

    def __init__(self, klt: PeriodKLT) -> None:
        self._klt = klt
        self._columns = 0
        self._coefficients: list[tuple[slice, torch.Tensor]] = []
        self._exact: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def read(self, reader: PayloadReader, like: torch.Tensor, tokens: slice, coder_name: str) -> None:
        """Takes in the frame of these `tokens`; `like` [layers, heads, its tokens, dim] is where its K will go.
        Raises ChunkFormatError for bytes that are no frame."""
        layers, heads, count, dim = like.shape
        step, rows, exact, escaped = reader.unpack(_FRAME)
        absurd = rows > self._klt.transform.columns or exact > count or escaped > rows * count
        if absurd or not SMALLEST_STEP <= step <= LARGEST_STEP:
            raise ChunkFormatError(
                f"a frame of {rows} coefficients, {exact} exact tokens and {escaped} escapes with step {step} is absurd"
            )
        exact_tokens = _increasing(reader, _TOKEN_DTYPE, exact, count)
        index = _increasing(reader, _INDEX_DTYPE, escaped, rows * count)
        escapes = np.frombuffer(reader.take(escaped * _VALUE_DTYPE.itemsize), _VALUE_DTYPE)
        if len(escapes) and int(np.abs(escapes.astype(np.int64)).max()) > LARGEST_INTEGER:
            raise ChunkFormatError("a frame escapes to integers that no KV has")
        if exact:
            kept = [torch.empty((layers, heads, exact, dim), dtype=like.dtype) for _ in range(2)]
            for tensor in kept:
                decode_words(reader, words_of(tensor))
            self._exact.append((torch.from_numpy(exact_tokens.astype(np.int64)) + tokens.start, *kept))
        if rows:
            floats = _integers(reader, coder_name, rows, count, index, escapes)
            floats *= np.float32(step)
            self._coefficients.append((tokens, torch.from_numpy(floats).to(compute_dtype(), copy=True)))
            self._columns = max(self._columns, rows)

    def restore_(self, low: torch.Tensor, out_keys: torch.Tensor, out_values: torch.Tensor) -> None:
        """Into [layers, heads, tokens, dim] tensors, on any device; `low` [tokens, rank] of the Prediction."""
        device = out_keys.device
        columns = -(-self._columns // _COLUMNS_AT_ONCE) * _COLUMNS_AT_ONCE
        inputs, room = self._klt.inputs(low, min(columns, self._klt.transform.columns))
        for tokens, coefficients in self._coefficients:
            room[tokens, : len(coefficients)] = coefficients.T
        self._klt.restore_(inputs.to(device), out_keys, out_values)
        for chosen, keys, values in self._exact:
            for out, tensor in ((out_keys, keys), (out_values, values)):
                out.index_copy_(2, chosen.to(device), tensor.to(device))


def _integers(
    reader: PayloadReader,
    coder_name: str,
    rows: int,
    tokens: int,
    index: npt.NDArray[np.unsignedinteger],
    escapes: npt.NDArray[np.signedinteger],
) -> npt.NDArray[np.float32]:
    """f32 [rows, tokens], valid until this thread reads the next frame."""
    samples = _SAMPLES.array((rows, tokens), np.uint8)
    decoder(coder_name).decode(reader.take_rest(), samples)
    floats = _FLOATS.array((rows, tokens), np.float32)
    np.subtract(samples, _ZERO_SAMPLE, out=floats, dtype=np.float32)
    floats.reshape(-1)[index] = escapes
    return floats


def _increasing(
    reader: PayloadReader, dtype: np.dtype[np.unsignedinteger], count: int, limit: int
) -> npt.NDArray[np.unsignedinteger]:
    """`count` indices below `limit`, each larger than the one before."""
    index: npt.NDArray[np.unsignedinteger] = np.frombuffer(reader.take(count * dtype.itemsize), dtype)
    if count and (int(index[-1]) >= limit or bool((index[1:] <= index[:-1]).any())):
        raise ChunkFormatError(f"a frame's list of {count} indices below {limit} is not increasing")
    return index
