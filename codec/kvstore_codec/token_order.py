"""Which tokens of a chunk matter most, as it is written into the chunk's header."""

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
    """Indices of a chunk's tokens, best first, so that any share of them is a prefix: by what is left of their KV at
    `low` and at `high` frequencies along the text. Neither names a token twice; each may end early."""

    low: tuple[int, ...]
    high: tuple[int, ...]

    def __post_init__(self) -> None:
        for name, order in (("low", self.low), ("high", self.high)):
            if len(set(order)) != len(order) or (order and min(order) < 0):
                raise ChunkFormatError(f"the {name} token order of a chunk names a token twice, or none")

    def require(self, tokens: int) -> None:
        """Raises ChunkFormatError unless it is one of a chunk of so many tokens."""
        worst = max(self.low + self.high, default=0)
        if worst >= tokens:
            raise ChunkFormatError(f"the token order of a chunk of {tokens} tokens names token {worst}")

    def pack(self, tokens: int) -> list[bytes]:
        """As a header of a chunk of so many tokens holds it: u8 for each index, u16 LE from 257 tokens on. Raises
        ChunkFormatError for a token that the chunk does not have."""
        self.require(tokens)
        return [np.array(order, _index_dtype(tokens)).tobytes() for order in (self.low, self.high)]

    @classmethod
    def unpack(cls, packed: Any, tokens: int) -> TokenOrder:
        """Raises ChunkFormatError or ValueError for what `pack` did not make, TypeError for what is no bytes."""
        low, high = (_indices(part, tokens) for part in packed)
        order = cls(low, high)
        order.require(tokens)
        return order


def _indices(packed: bytes, tokens: int) -> tuple[int, ...]:
    indices: Sequence[int] = np.frombuffer(packed, _index_dtype(tokens)).tolist()
    return tuple(indices)


def _index_dtype(tokens: int) -> np.dtype[Any]:
    return _SMALL if tokens <= _SMALL_TOKENS else _LARGE
