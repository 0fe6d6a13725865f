"""Ranking of a chunk's tokens by importance, as stored in the chunk's header."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvstore_codec.errors import ChunkFormatError

_SMALL, _LARGE = np.dtype("u1"), np.dtype("<u2")
_SMALL_TOKENS = 1 << 8 * _SMALL.itemsize


@dataclass(frozen=True, slots=True)
class TokenOrder:
    """Two rankings of a chunk's tokens, most important first: by the part of their KV at `low` and at `high`
    frequencies along the text. A prefix of a ranking is a selection of tokens. Neither ranking names a token twice;
    each may list fewer than all tokens."""

    low: tuple[int, ...]
    high: tuple[int, ...]

    def __post_init__(self) -> None:
        for name, order in (("low", self.low), ("high", self.high)):
            if len(set(order)) != len(order) or (order and min(order) < 0):
                raise ChunkFormatError(
                    f"the {name} token order of a chunk names a token twice, or a negative index"
                )

    def require(self, tokens: int) -> None:
        """Raises ChunkFormatError if a ranking names a token beyond a chunk of `tokens` tokens."""
        worst = max(self.low + self.high, default=0)
        if worst >= tokens:
            raise ChunkFormatError(f"the token order of a chunk of {tokens} tokens names token {worst}")

    def pack(self, tokens: int) -> list[bytes]:
        """Serialises both rankings for the header of a chunk of `tokens` tokens: u8 per index, u16 LE if the chunk has
        more than 256 tokens. Raises ChunkFormatError for an index beyond the chunk."""
        self.require(tokens)
        return [np.array(order, _index_dtype(tokens)).tobytes() for order in (self.low, self.high)]

    @classmethod
    def unpack(cls, packed: Any, tokens: int) -> TokenOrder:
        """Inverse of `pack`. Raises ChunkFormatError or ValueError for other bytes, TypeError for other types."""
        low, high = (_indices(part, tokens) for part in packed)
        order = cls(low, high)
        order.require(tokens)
        return order


def _indices(packed: bytes, tokens: int) -> tuple[int, ...]:
    dtype = _index_dtype(tokens)
    if len(packed) > tokens * dtype.itemsize:
        raise ChunkFormatError(f"a token order of {len(packed)} bytes in a chunk of {tokens} tokens")
    indices: Sequence[int] = np.frombuffer(packed, dtype).tolist()
    return tuple(indices)


def _index_dtype(tokens: int) -> np.dtype[Any]:
    return _SMALL if tokens <= _SMALL_TOKENS else _LARGE
