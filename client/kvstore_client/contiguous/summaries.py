"""Key summaries: what a question is scored against, instead of the keys themselves.

A frame holds keys and values of all layers of its period, so reading the keys of a period's first layer to score them
(as ContiguousKV does) means reading every frame. A summary is small enough to be kept for every frame: the mean and the
standard deviation, channel by channel, of the keys of each unit of tokens, for each KV head of the period's first
layer, after RoPE at the position in the prefix. docs/reprefill.md has the measurements behind the choice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from kvstore_codec.errors import InvalidKVError
from kvstore_codec.geometry import Geometry

_UNIT_TOKENS = 32
_LARGEST = 127
_SCALE_DTYPE = np.dtype("<f4")


@dataclass(frozen=True, slots=True)
class SummaryShape:
    """Shape of the summaries of a chunk."""

    period_layers: int
    periods: int
    kv_heads: int
    head_dim: int
    unit_tokens: int
    units: int
    """Units in a chunk."""

    @classmethod
    def of(cls, geometry: Geometry) -> SummaryShape:
        """For chunks of this geometry. A unit is a frame, or a part of one."""
        unit_tokens = min(_UNIT_TOKENS, geometry.frame_tokens)
        return cls(
            geometry.period_layers,
            geometry.periods,
            geometry.kv_heads,
            geometry.head_dim,
            unit_tokens,
            geometry.tokens // unit_tokens,
        )

    @property
    def rows(self) -> tuple[int, int, int, int]:
        """Shape of the scales: mean and deviation, periods, KV heads, units."""
        return 2, self.periods, self.kv_heads, self.units

    @property
    def size_bytes(self) -> int:
        return int(np.prod(self.rows)) * (_SCALE_DTYPE.itemsize + self.head_dim)


@dataclass(frozen=True, slots=True)
class ChunkSummary:
    """Means and deviations of a chunk's keys: integers, i8 `[2, periods, kv_heads, units, head_dim]`, times a scale for
    each row of them, f32 `[2, periods, kv_heads, units]`."""

    integers: npt.NDArray[np.int8]
    scales: npt.NDArray[np.float32]

    @classmethod
    def make(cls, first_layers: Sequence[torch.Tensor], shape: SummaryShape) -> ChunkSummary:
        """Summarise a chunk from the rotated keys of each period's first layer, `[kv_heads, tokens, head_dim]`."""
        keys = torch.stack([keys.float().cpu() for keys in first_layers])
        units = keys.view(*keys.shape[:2], shape.units, shape.unit_tokens, shape.head_dim)
        deviations, means = torch.std_mean(units, 3, correction=0)
        values = torch.stack((means, deviations))
        scales = (values.abs().amax(-1) / _LARGEST).clamp_min(torch.finfo(torch.float32).tiny)
        integers = (values / scales[..., None]).round().to(torch.int8)
        return cls(integers.numpy(), scales.numpy())

    @classmethod
    def from_bytes(cls, data: bytes, shape: SummaryShape) -> ChunkSummary:
        """The inverse of `to_bytes`. Raises InvalidKVError for bytes of another size and for scales that are not
        finite."""
        if len(data) != shape.size_bytes:
            raise InvalidKVError(f"a key summary of {len(data)} bytes, expected {shape.size_bytes}")
        count = int(np.prod(shape.rows))
        scales = np.frombuffer(data, _SCALE_DTYPE, count).reshape(shape.rows)
        if not np.isfinite(scales).all():
            raise InvalidKVError("a key summary has scales that are not finite")
        integers = np.frombuffer(data, np.int8, offset=count * _SCALE_DTYPE.itemsize)
        return cls(integers.reshape(*shape.rows, shape.head_dim), scales)

    def to_bytes(self) -> bytes:
        return self.scales.astype(_SCALE_DTYPE).tobytes() + self.integers.tobytes()

    @property
    def size_bytes(self) -> int:
        return self.integers.nbytes + self.scales.nbytes


Scorer = Callable[[int, torch.Tensor, float], torch.Tensor]
"""Scores all frames of a period: takes the period, the question's rotated queries in the period's first layer
`[heads, tokens, head_dim]`, and the scale of query-key products; returns f32 `[frames]`, which sum to 1: the share of
the question's attention that each frame is expected to receive."""


class SummaryScorer:
    """Scores frames by the attention that a question's queries are expected to pay to the keys behind their summaries;
    a `Scorer`.

    For keys k of mean m and standard deviation s in each channel, E[exp(q.k)] is exp(q.m + (q*q).(s*s) / 2) if the
    channels are normal and independent. All units have equally many tokens.
    """

    def __init__(self, summaries: Sequence[ChunkSummary], frame_tokens: int, shape: SummaryShape) -> None:
        self._units_per_frame = frame_tokens // shape.unit_tokens
        integers = np.concatenate([summary.integers for summary in summaries], axis=3)
        scales = np.concatenate([summary.scales for summary in summaries], axis=3)
        self._integers, self._scales = torch.from_numpy(integers), torch.from_numpy(scales)

    def __call__(self, period: int, queries: torch.Tensor, scale: float) -> torch.Tensor:
        values = self._integers[:, period].float() * self._scales[:, period, ..., None]
        means, deviations = values.to(queries.device)
        asked = _by_kv_head(queries, len(means)) * scale
        logits = asked @ means.transpose(1, 2)
        logits.baddbmm_(asked.square(), deviations.square().transpose(1, 2), alpha=0.5)
        return _shares(logits, self._units_per_frame)


def attention_shares(
    queries: torch.Tensor, keys: torch.Tensor, scale: float, tokens_per_frame: int
) -> torch.Tensor:
    """Share of the queries' attention over `keys`, `[kv_heads, tokens, head_dim]`, that goes to each frame of
    `tokens_per_frame` keys, f32 `[frames]`. What a Scorer estimates."""
    asked = _by_kv_head(queries, len(keys)) * scale
    return _shares(asked @ keys.float().transpose(1, 2), tokens_per_frame)


def _by_kv_head(queries: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """Queries as f32 `[kv_heads, heads_per_kv_head * tokens, head_dim]`: query heads that share a KV head (GQA) are
    rows of one matrix."""
    return queries.float().reshape(kv_heads, -1, queries.shape[-1])


def _shares(logits: torch.Tensor, per_frame: int) -> torch.Tensor:
    """A frame's score is the sum over its tokens, and the mean over query tokens and query heads (ContiguousKV, section
    on chunk scoring)."""
    return logits.softmax(-1).mean((0, 1)).view(-1, per_frame).sum(-1)
