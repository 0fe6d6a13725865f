"""The fixed probe text, and the part of its KV that the canary keeps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from kvstore_codec.errors import CanaryError
from kvstore_codec.model_spec import ModelSpec

NEAR_TOKENS, SPREAD_TOKENS = 128, 128
TOKENS = NEAR_TOKENS + SPREAD_TOKENS
MAX_VOCABULARY = 1 << 31
MAX_LENGTH = 1 << 31

_DOMAIN = b"kvstore.canary.probe.v1"
_MOST_TOKENS = 16
_MAX_KV_BYTES = 4 << 20
"""Most KV bytes in a sketch. A model of 70 billion parameters and 8 KV heads keeps 12 tokens of 320 KiB each."""


@dataclass(frozen=True, slots=True)
class Probe:
    """A text of `TOKENS` token ids. The first `NEAR_TOKENS` are at the positions from 0 on. The others are spread
    evenly from there to position `length` - 1. The spread tokens attend mostly to distant tokens, so an error in RoPE's
    frequencies, which grows with distance, shows in every layer but the first.

    blake3 draws the ids from the whole `vocabulary`, so they are the same in every process. Raises CanaryError for
    numbers that no model has.
    """

    vocabulary: int
    length: int

    def __post_init__(self) -> None:
        if type(self.vocabulary) is not int or not 1 <= self.vocabulary <= MAX_VOCABULARY:
            raise CanaryError(f"a probe of {self.vocabulary!r} different tokens cannot be drawn")
        if type(self.length) is not int or not TOKENS <= self.length <= MAX_LENGTH:
            raise CanaryError(f"a probe of {TOKENS} tokens cannot be spread over {self.length!r} positions")

    @classmethod
    def reaching(cls, vocabulary: int, longest_text: int) -> Probe:
        """A probe that spans the positions of a model's longest text, and at least `TOKENS` positions."""
        return cls(vocabulary, max(TOKENS, longest_text))

    def __str__(self) -> str:
        return f"a text from {self.vocabulary} token ids over {self.length} positions"

    def token_ids(self) -> npt.NDArray[np.int64]:
        """The token ids, `[TOKENS]`."""
        drawn = np.frombuffer(blake3(_DOMAIN).digest(length=8 * TOKENS), "<u8")
        return (drawn % np.uint64(self.vocabulary)).astype(np.int64)

    def positions(self) -> npt.NDArray[np.int64]:
        """The positions of the tokens, `[TOKENS]`, ascending."""
        steps = np.arange(1, SPREAD_TOKENS + 1, dtype=np.int64)
        spread = NEAR_TOKENS - 1 + steps * (self.length - NEAR_TOKENS) // SPREAD_TOKENS
        return np.concatenate((np.arange(NEAR_TOKENS, dtype=np.int64), spread))


@dataclass(frozen=True, slots=True)
class Sample:
    """The part of the probe's KV that the canary keeps: these tokens of these layers, all heads and dimensions."""

    layers: tuple[int, ...]
    tokens: tuple[int, ...]
    """Evenly spaced indices into the probe. The last one is its last token."""

    @classmethod
    def of(cls, spec: ModelSpec) -> Sample:
        """The sample of a model, as much as fits into 4 MiB: up to 16 tokens of every layer. If not even one token
        fits, one token of every n-th layer, including the last. Raises CanaryError if one layer does not fit."""
        stride = -(-spec.kv_bytes_per_token // _MAX_KV_BYTES)
        layers = tuple(range(spec.layers - 1, -1, -stride))[::-1]
        token_bytes = len(layers) * (spec.kv_bytes_per_token // spec.layers)
        if token_bytes > _MAX_KV_BYTES:
            raise CanaryError(f"one token of {spec.model_id} has {token_bytes} bytes of KV in a layer")
        count = min(_MOST_TOKENS, _MAX_KV_BYTES // token_bytes)
        return cls(layers, tuple(TOKENS * (number + 1) // count - 1 for number in range(count)))
