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
from kvstore_codec.klt import compute_dtype

_UNIT_TOKENS = 32
_LARGEST = 127
_SCALE_DTYPE = np.dtype("<f4")
_TINY = torch.finfo(torch.float32).tiny
_BITS = 4
_LEVELS = 1 << _BITS
_PER_BYTE = 8 // _BITS
"""Levels in a byte, the first one in the lowest bits."""
_STEP = 0.3352
"""Distance of levels in standard deviations: of all uniform quantisers with 16 levels the best for normal values."""

_BLOCK_CHUNKS = 8
"""Chunks whose products with a KV head's queries are computed at once on a processor. Of 4,096 keys in two threads: 3.8
ms instead of 5.3 for 192 queries of each KV head, 4.7 instead of 7.3 for 225, 2.9 instead of 2.6 for 90. With 4 chunks
or all 16 there are 4.0, 4.9 and 3.4, or 4.1, 5.6 and 2.6."""

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
        return len(self.layers), self.kv_heads, self.tokens, -(-self.head_dim // _PER_BYTE)

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
        levels = (distances / _STEP + _LEVELS / 2).floor().clamp(0, _LEVELS - 1).to(torch.uint8)
        return cls(integers.numpy(), scales.numpy(), _packed(levels.view(keys.shape)))

    @classmethod
    def from_bytes(cls, data: bytes, shape: SummaryShape) -> ChunkSummary:
        """The inverse of `to_bytes`. Raises InvalidKVError for bytes of another size and for scales that are not
        finite."""
        if len(data) != shape.size_bytes:
            raise InvalidKVError(f"a key summary of {len(data)} bytes, expected {shape.size_bytes}")
        rows = math.prod(shape.rows)
        scales = np.frombuffer(data, _SCALE_DTYPE, rows).reshape(shape.rows)
        if not np.isfinite(scales).all():
            raise InvalidKVError("a key summary has scales that are not finite")
        integers = np.frombuffer(data, np.int8, rows * shape.head_dim, scales.nbytes)
        levels = np.frombuffer(data, np.uint8, offset=scales.nbytes + integers.nbytes)
        return cls(integers.reshape(*shape.rows, shape.head_dim), scales, levels.reshape(shape.levels))

    def to_bytes(self) -> bytes:
        return self.scales.astype(_SCALE_DTYPE).tobytes() + self.integers.tobytes() + self.levels.tobytes()

    @property
    def size_bytes(self) -> int:
        return self.integers.nbytes + self.scales.nbytes + self.levels.nbytes


class PrefixKeys:
    """The keys of a prefix as its summaries tell them."""

    def __init__(self, summaries: Sequence[ChunkSummary], shape: SummaryShape) -> None:
        self.shape = shape
        self._places = {layer: place for place, layer in enumerate(shape.layers)}
        self._integers, self._scales = (
            torch.from_numpy(np.concatenate(parts, axis=3))
            for parts in ([one.integers for one in summaries], [one.scales for one in summaries])
        )
        self._levels = torch.from_numpy(np.concatenate([one.levels for one in summaries], axis=2))

    def best_products(self, layer: int, queries: torch.Tensor, frame_tokens: int) -> torch.Tensor:
        """Largest product of each query with a key of each frame of `frame_tokens` keys of a scored layer, f32
        `[kv_heads, frames, queries]` on the queries' device, from rotated queries `[kv_heads, queries, head_dim]`, f32.

        Keys are the mean of their unit plus a deviation. Products with deviations, which are most of the work, are in
        bfloat16 where the machine has instructions for it; products with means, which may be far larger, are not."""
        asked, unit_tokens = _by_place(queries), self.shape.unit_tokens
        place = self._places[layer]
        means, steps = (part.to(queries.device) for part in self._means_and_steps(place))
        deviations = self._deviations(place, steps)
        middles = means @ asked.transpose(1, 2)
        part_tokens = math.gcd(frame_tokens, unit_tokens)
        heads, tokens, count = *deviations.shape[:2], asked.shape[1]
        best = middles.new_empty(heads, tokens // frame_tokens, count)
        # Some chunks at a time, in memory that is used again: all products are as large as the prefix is long, and
        # fresh memory costs up to a third of the time. Many small steps would keep another device waiting.
        block_tokens = _BLOCK_CHUNKS * self.shape.tokens if queries.is_cpu else tokens
        memory = deviations.new_empty(min(block_tokens, tokens), count)
        for head, rows in enumerate(asked.to(deviations.dtype).transpose(1, 2)):
            for begin in range(0, tokens, block_tokens):
                block = slice(begin, min(tokens, begin + block_tokens))
                products = memory[: block.stop - begin]
                torch.mm(deviations[head, block], rows, out=products)
                parts = products.view(-1, part_tokens, count).amax(1).float()
                units = slice(begin // unit_tokens, block.stop // unit_tokens)
                parts.view(-1, unit_tokens // part_tokens, count).add_(middles[head, units, None])
                frames = slice(begin // frame_tokens, block.stop // frame_tokens)
                torch.amax(parts.view(-1, frame_tokens // part_tokens, count), 1, out=best[head, frames])
        return best

    def _means_and_steps(self, place: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each unit of the scored layer at this place, the middle of its levels and the distance between them, f32
        `[kv_heads, units, channels]`, with channels in the order of `_by_place`."""
        means, deviations = self._integers[:, place].float() * self._scales[:, place, ..., None]
        return _by_place(means), _by_place(deviations.mul_(_STEP))

    def _deviations(self, place: int, steps: torch.Tensor) -> torch.Tensor:
        """Keys of the scored layer at this place without their units' means, `[kv_heads, tokens, channels]`, with
        channels in the order of `_by_place`: so they are unpacked by a few operations on whole tensors, in half the
        time."""
        packed = self._levels[place].to(steps.device)
        levels = torch.empty(
            *packed.shape[:2], _PER_BYTE, packed.shape[2], dtype=compute_dtype(), device=steps.device
        )
        for number in range(_PER_BYTE):
            levels[:, :, number] = (packed >> number * _BITS) & (_LEVELS - 1)
        by_unit = levels.view(*steps.shape[:2], self.shape.unit_tokens, -1)
        by_unit.sub_((_LEVELS - 1) / 2).mul_(steps[:, :, None])
        return by_unit.flatten(1, 2)


def _by_place(channels: torch.Tensor) -> torch.Tensor:
    """`[..., head_dim]` with the channels whose levels have the same place in their byte together, padded with zeros to
    whole bytes."""
    padded = torch.nn.functional.pad(channels, (0, -channels.shape[-1] % _PER_BYTE))
    return padded.view(*padded.shape[:-1], -1, _PER_BYTE).transpose(-1, -2).flatten(-2)


def _packed(levels: torch.Tensor) -> npt.NDArray[np.uint8]:
    padded = torch.nn.functional.pad(levels, (0, -levels.shape[-1] % _PER_BYTE))
    shifts = torch.arange(0, 8, _BITS, dtype=torch.uint8, device=levels.device)
    digits = padded.view(*padded.shape[:-1], -1, _PER_BYTE) << shifts
    packed: npt.NDArray[np.uint8] = digits.sum(-1, dtype=torch.uint8).numpy()
    return packed
