"""Key summaries: what a question is scored against, instead of the keys themselves.

A frame holds keys and values of all layers of its period, so reading keys to score them (as ContiguousKV does with
those of a period's first layer) means reading every frame. A summary is small enough to be kept for all keys of the
layers that are scored, after RoPE at the position in the prefix: four bits for each channel of each key, in steps of
the channel's standard deviation around its mean, both taken over a unit of tokens. docs/reprefill.md has the
measurements behind the choice.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from kvstore_codec.errors import InvalidKVError
from kvstore_codec.geometry import Geometry

_UNIT_TOKENS = 32
_LARGEST = 127
_LARGEST_SCALE = (1 << 20) / _LARGEST
_SCALE_DTYPE = np.dtype("<f4")
_TINY = torch.finfo(torch.float32).tiny
BITS = 4
LEVELS = 1 << BITS
PER_BYTE = 8 // BITS
"""Levels in a byte, the first one in the lowest bits."""
STEP = 0.3352
"""Distance of levels in standard deviations: of all uniform quantisers with 16 levels the best for normal values."""

SCORED_LAYERS = 2
"""Number of last layers of each period whose keys are summarised, and whose queries choose the period's frames. With
exact keys two are as faithful as all four, and the last two more than any other two of them; one is far worse."""


def scored_layers(period: range) -> range:
    """Those of a period's layers that frames are chosen by."""
    return period[-SCORED_LAYERS:]


@dataclass(frozen=True, slots=True)
class SummaryShape:
    """Shape of the summaries of a chunk. It depends on the chunk's periods, but not on the tokens of its frames."""

    layers: tuple[int, ...]
    """The layers that are scored."""
    kv_heads: int
    head_dim: int
    tokens: int
    unit_tokens: int

    @classmethod
    def of(cls, geometry: Geometry) -> SummaryShape:
        """For chunks of this geometry."""
        unit_tokens = math.gcd(_UNIT_TOKENS, geometry.tokens)
        periods = (scored_layers(geometry.layers_of(period)) for period in range(geometry.periods))
        layers = tuple(itertools.chain(*periods))
        return cls(layers, geometry.kv_heads, geometry.head_dim, geometry.tokens, unit_tokens)

    @property
    def rows(self) -> tuple[int, int, int, int]:
        """Shape of the scales: mean and deviation, layers, KV heads, units."""
        return 2, len(self.layers), self.kv_heads, self.tokens // self.unit_tokens

    @property
    def levels(self) -> tuple[int, int, int, int]:
        """Shape of the packed levels: layers, KV heads, tokens, bytes of a key."""
        return len(self.layers), self.kv_heads, self.tokens, -(-self.head_dim // PER_BYTE)

    @property
    def size_bytes(self) -> int:
        return math.prod(self.rows) * (_SCALE_DTYPE.itemsize + self.head_dim) + math.prod(self.levels)


@dataclass(frozen=True, slots=True)
class ChunkSummary:
    """Means and deviations of a chunk's keys: integers, i8 `[2, layers, kv_heads, units, head_dim]`, times a scale for
    each row of them, f32 `[2, layers, kv_heads, units]`. The levels of each key's channels, packed, u8
    `[layers, kv_heads, tokens, bytes]`."""

    integers: npt.NDArray[np.int8]
    scales: npt.NDArray[np.float32]
    levels: npt.NDArray[np.uint8]

    @classmethod
    def make(cls, layers: Sequence[torch.Tensor], shape: SummaryShape) -> ChunkSummary:
        """Summarise a chunk from the rotated keys of each scored layer, `[kv_heads, tokens, head_dim]`."""
        keys = torch.stack([keys.float().cpu() for keys in layers])
        units = keys.view(*keys.shape[:2], -1, shape.unit_tokens, shape.head_dim)
        deviations, means = torch.std_mean(units, 3, correction=0)
        values = torch.stack((means, deviations))
        scales = (values.abs().amax(-1) / _LARGEST).clamp_min(_TINY)
        integers = (values / scales[..., None]).round().to(torch.int8)
        means, deviations = integers.float() * scales[..., None]
        distances = (units - means[..., None, :]) / deviations.clamp_min(_TINY)[..., None, :]
        levels = (distances / STEP + LEVELS / 2).floor().clamp(0, LEVELS - 1).to(torch.uint8)
        return cls(integers.numpy(), scales.numpy(), _packed(levels.view(keys.shape)))

    @classmethod
    def from_bytes(cls, data: bytes, shape: SummaryShape) -> ChunkSummary:
        """The inverse of `to_bytes`. Raises InvalidKVError for bytes of another size and for scales of keys beyond
        2^20, which no model computes."""
        if len(data) != shape.size_bytes:
            raise InvalidKVError(f"a key summary of {len(data)} bytes, expected {shape.size_bytes}")
        rows = math.prod(shape.rows)
        scales = np.frombuffer(data, _SCALE_DTYPE, rows).reshape(shape.rows)
        # Also of numbers that are not finite: products with them would be no numbers, and choose no frames.
        if not (np.abs(scales) <= _LARGEST_SCALE).all():
            raise InvalidKVError("a key summary has scales that no keys have")
        integers = np.frombuffer(data, np.int8, rows * shape.head_dim, scales.nbytes)
        levels = np.frombuffer(data, np.uint8, offset=scales.nbytes + integers.nbytes)
        return cls(integers.reshape(*shape.rows, shape.head_dim), scales, levels.reshape(shape.levels))

    def to_bytes(self) -> bytes:
        return self.scales.astype(_SCALE_DTYPE).tobytes() + self.integers.tobytes() + self.levels.tobytes()

    @property
    def size_bytes(self) -> int:
        return self.integers.nbytes + self.scales.nbytes + self.levels.nbytes


def _packed(levels: torch.Tensor) -> npt.NDArray[np.uint8]:
    padded = torch.nn.functional.pad(levels, (0, -levels.shape[-1] % PER_BYTE))
    shifts = torch.arange(0, 8, BITS, dtype=torch.uint8, device=levels.device)
    digits = padded.view(*padded.shape[:-1], -1, PER_BYTE) << shifts
    packed: npt.NDArray[np.uint8] = digits.sum(-1, dtype=torch.uint8).numpy()
    return packed
