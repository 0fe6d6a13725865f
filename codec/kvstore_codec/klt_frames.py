"""Frames of KLT coefficients. A frame holds 64 tokens x one period as a plane of 8-bit samples. Each row is one
coefficient, the most important first.

    step f32 | coefficients u16 | exact tokens u16 | escapes u32 | exact token index u16 [n] | escape index u32 [m] |
    escape value i32 [m] | K and V of the exact tokens, as words | coded plane [coefficients, tokens]

A sample is 128 + the integer. Integers beyond 8 bits are listed as escapes, never clipped. Trailing rows that reduce
the error hardly at all are not coded, which leaves 1.5 times fewer rows to decode and multiply. Every frame stores its
own step, because the guard refines it for text that is unlike the calibration's.
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
from kvstore_codec.payload import PayloadKind, PayloadReader, PayloadWriter
from kvstore_codec.scratch import ThreadScratch
from kvstore_codec.words import decode_words, encode_words, words_of

# Tokens restored in one product. With 256 a token takes a third more time, because the matrix is rearranged for each
# product. More than 1,024 gain little.
TOKENS_AT_ONCE = 1024
# Coefficients whose standard deviation is below this fraction of the step round to zero except for one in thousands.
_SELDOM_ROUNDED_UP = 1 / 8
# The number of columns in a product is a multiple of this. oneDNN compiles a kernel for every new size, which makes the
# first product of a size six times as slow.
_COLUMNS_AT_ONCE = 64
# Largest value, as a fraction of the dtype's maximum: a product in bfloat16 may round up by 2^-8.
_CLOSE_TO_INFINITY = 1 - 2**-7
_ZERO_SAMPLE = 128

_FRAME = struct.Struct("<fHHI")
_TOKEN_DTYPE, _INDEX_DTYPE, _VALUE_DTYPE = np.dtype("<u2"), np.dtype("<u4"), np.dtype("<i4")

_SAMPLES = ThreadScratch()


class KLT:
    """A calibration prepared for encoding and decoding. Thread-safe. Expensive to make: create it once and keep it."""

    def __init__(self, calibration: Calibration) -> None:
        self.calibration = calibration
        self.periods = [PeriodKLT(period) for period in calibration.periods]
        predictors = [period.predictor_in for period in calibration.periods]
        self._predicting = torch.cat(predictors, dim=1).to(compute_dtype())

    def predict(self, features: torch.Tensor) -> Prediction:
        """Predicts the KV of a chunk from its `token_features` [tokens, features], without any of the chunk's bytes.

        Raises InvalidKVError for features of another shape."""
        if features.ndim != 2 or features.shape[1] != self.calibration.features:
            raise InvalidKVError(
                f"this calibration predicts from features [tokens, {self.calibration.features}], got "
                f"{list(features.shape)}; make them with token_features from the model's input embeddings"
            )
        low = features.to(self._predicting) @ self._predicting
        return Prediction(torch.split(low, [period.rank for period in self.periods], dim=1))

    def target(self, rate: Rate | float, period: int) -> Target:
        """Step and error limit of a rate for a period. Raises CalibrationError for a rate without a step."""
        if not isinstance(rate, Rate):
            return Target(rate, math.inf)
        if rate not in self.calibration.steps:
            known = ", ".join(self.calibration.steps) or "none"
            raise CalibrationError(f"the calibration has no step for rate {rate!r}; it has {known}")
        return Target(self.calibration.steps[rate], self.calibration.errors[rate][period])


@dataclass(frozen=True, slots=True)
class Prediction:
    """Prediction of a chunk's KV: features reduced to the rank of each period's predictor."""

    low: tuple[torch.Tensor, ...]
    """one tensor per period, [tokens, rank]"""

    @property
    def tokens(self) -> int:
        return len(self.low[0])

    def at(self, period: int, tokens: slice) -> torch.Tensor:
        return self.low[period][tokens]


@dataclass(frozen=True, slots=True)
class EncodedFrame:
    data: bytes
    guarded: bool
    """Whether the guard chose a finer step than the rate's."""


def encode_klt_frame(
    keys: torch.Tensor,
    values: torch.Tensor,
    low: torch.Tensor,
    klt: PeriodKLT,
    target: Target,
    exact_tokens: Sequence[int],
    coder_name: str,
) -> EncodedFrame | None:
    """Encodes a frame. `keys` and `values` are [layers, heads, tokens, dim] in host memory; `low`, [tokens, rank], is
    the Prediction of these tokens.

    Returns None for KV that needs an exact frame: NaN, infinities, values that may round to infinity, or an error that
    no step reduces enough.
    """
    largest = max(float(keys.abs().max()), float(values.abs().max()))
    if not largest <= _CLOSE_TO_INFINITY * torch.finfo(keys.dtype).max:
        return None
    rows = token_vectors(keys, values)
    inexact = klt.transform.values * (len(rows) - len(exact_tokens))
    every = klt.transform.columns
    # Text like the calibration's needs only few columns, which is a third of the work. Other text needs all of them.
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
    writer = PayloadWriter(PayloadKind.KLT)
    writer.add(
        _FRAME.pack(step, count, len(exact_tokens), len(outside)),
        np.asarray(exact_tokens, _TOKEN_DTYPE).data,
        outside.astype(_INDEX_DTYPE).data,
        escapes.astype(_VALUE_DTYPE).data,
    )
    if exact_tokens:
        chosen = torch.as_tensor(exact_tokens, device="cpu")
        for tensor in (keys, values):
            encode_words(words_of(tensor.index_select(2, chosen).contiguous()), writer)
    if samples.size:
        writer.add_coded(coder(coder_name).encode(samples), samples)
    return EncodedFrame(writer.frame(), step < target.step)


@dataclass(frozen=True, slots=True)
class DecodedFrame:
    """Decoded integers and exact tokens of one frame. It is small and does not depend on other frames."""

    step: float
    samples: torch.Tensor
    """i8 [tokens, coefficients]"""
    escaped: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None
    """token, coefficient and value of the integers beyond 8 bits"""
    exact: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None
    """indices of the exact tokens, and their K and V [layers, heads, exact tokens, dim]"""

    @property
    def tokens(self) -> int:
        return len(self.samples)

    @property
    def columns(self) -> int:
        return self.samples.shape[1]


@dataclass(frozen=True, slots=True)
class Restoration:
    """Consecutive frames of a chunk, and the tensors for their KV."""

    frames: Sequence[DecodedFrame]
    low: torch.Tensor
    """[tokens of these frames, rank], the Prediction of these tokens"""
    out_keys: torch.Tensor
    """[layers, heads, tokens of these frames, dim] with any strides; `out_values` has the same shape"""
    out_values: torch.Tensor

    @property
    def tokens(self) -> int:
        return len(self.low)


def decode_klt_frame(
    reader: PayloadReader, klt: PeriodKLT, like: torch.Tensor, coder_name: str
) -> DecodedFrame:
    """Decodes a frame to integers. `like`, [layers, heads, tokens, dim], gives the shape and dtype of the frame's K.
    Raises ChunkFormatError for invalid bytes."""
    layers, heads, tokens, dim = like.shape
    step, rows, exact, escaped = reader.unpack(_FRAME)
    absurd = rows > klt.transform.columns or exact > tokens or escaped > rows * tokens
    if absurd or not SMALLEST_STEP <= step <= LARGEST_STEP:
        raise ChunkFormatError(
            f"a frame of {rows} coefficients, {exact} exact tokens and {escaped} escapes with step {step} is absurd"
        )
    exact_tokens = _increasing(reader, _TOKEN_DTYPE, exact, tokens)
    index = _increasing(reader, _INDEX_DTYPE, escaped, rows * tokens)
    escapes = np.frombuffer(reader.take(escaped * _VALUE_DTYPE.itemsize), _VALUE_DTYPE)
    if len(escapes) and int(np.abs(escapes.astype(np.int64)).max()) > LARGEST_INTEGER:
        raise ChunkFormatError("a frame has escapes beyond the largest possible integer")
    kept = None
    if exact:
        keys, values = (
            torch.empty((layers, heads, exact, dim), dtype=like.dtype, device="cpu") for _ in range(2)
        )
        for tensor in (keys, values):
            decode_words(reader, words_of(tensor))
        kept = torch.from_numpy(exact_tokens.astype(np.int64)), keys, values
    samples = np.empty((tokens, rows), np.int8)
    if rows:
        plane = _SAMPLES.array((rows, tokens), np.uint8)
        decoder(coder_name).decode(reader.take_rest(), plane)
        reader.decoded(plane)
        plane ^= np.uint8(_ZERO_SAMPLE)  # subtracts 128, as i8
        samples[...] = plane.view(np.int8).T
    beyond = None
    if escaped:
        coefficient, token = (torch.from_numpy(part) for part in np.divmod(index.astype(np.int64), tokens))
        beyond = token, coefficient, torch.from_numpy(escapes.astype(np.float32))
    return DecodedFrame(step, torch.from_numpy(samples), beyond, kept)


def restore_together_(klt: PeriodKLT, pieces: Sequence[Restoration]) -> None:
    """Restores the KV of frames of one period, from any number of chunks, to tensors on one device with one dtype. One
    product covers up to TOKENS_AT_ONCE tokens, which limits the memory to two matrices of so many rows."""
    batch: list[Restoration] = []
    tokens = 0
    for piece in pieces:
        if batch and tokens + piece.tokens > TOKENS_AT_ONCE:
            _restore_batch_(klt, batch)
            batch, tokens = [], 0
        batch.append(piece)
        tokens += piece.tokens
    if batch:
        _restore_batch_(klt, batch)


def _restore_batch_(klt: PeriodKLT, batch: Sequence[Restoration]) -> None:
    device, dtype = batch[0].out_keys.device, batch[0].out_keys.dtype
    columns = max(frame.columns for piece in batch for frame in piece.frames)
    columns = min(-(-columns // _COLUMNS_AT_ONCE) * _COLUMNS_AT_ONCE, klt.transform.columns)
    low = batch[0].low if len(batch) == 1 else torch.cat([piece.low for piece in batch])
    inputs, room = klt.inputs(low, columns)
    first = 0
    for frame in (frame for piece in batch for frame in piece.frames):
        _dequantise(frame, room[first : first + frame.tokens])
        first += frame.tokens
    rows = klt.product(inputs.to(device), dtype)
    first = 0
    for piece in batch:
        klt.place_(rows[first : first + piece.tokens], piece.out_keys, piece.out_values)
        first += piece.tokens
        _place_exact_(piece)


def _place_exact_(piece: Restoration) -> None:
    device, first = piece.out_keys.device, 0
    for frame in piece.frames:
        if frame.exact:
            tokens, keys, values = (tensor.to(device) for tensor in frame.exact)
            piece.out_keys.index_copy_(2, tokens + first, keys)
            piece.out_values.index_copy_(2, tokens + first, values)
        first += frame.tokens


def _dequantise(frame: DecodedFrame, room: torch.Tensor) -> None:
    """Writes integers times step to `room`, [tokens, at least the frame's columns]."""
    # Eight bits are exact in bfloat16, so a product in bfloat16 is the f32 product, rounded once.
    room[:, : frame.columns].copy_(frame.samples).mul_(frame.step)
    if frame.escaped:
        token, coefficient, value = frame.escaped
        room[token, coefficient] = (value * frame.step).to(room.dtype)


def _increasing(
    reader: PayloadReader, dtype: np.dtype[np.unsignedinteger], count: int, limit: int
) -> npt.NDArray[np.unsignedinteger]:
    """Reads `count` increasing indices below `limit`. Raises ChunkFormatError for others."""
    index: npt.NDArray[np.unsignedinteger] = np.frombuffer(reader.take(count * dtype.itemsize), dtype)
    if count and (int(index[-1]) >= limit or bool((index[1:] <= index[:-1]).any())):
        raise ChunkFormatError(f"a frame's list of {count} indices below {limit} is not increasing")
    return index
