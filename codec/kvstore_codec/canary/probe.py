"""The fixed text, and which part of its KV is kept."""

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
"""KV that a sketch holds at most. A model of 70 billion parameters with 8 KV heads keeps 12 tokens of 320 KiB each."""


@dataclass(frozen=True, slots=True)
class Probe:
    """A text of `TOKENS` token ids: the first `NEAR_TOKENS` at the positions from 0 on, the others spread evenly from
    there to the last position below `length`. Most of what the spread ones attend to is far away, so an error in RoPE's
    frequencies, which grows with the distance, shows in every layer but the first.

    The ids are drawn from the whole `vocabulary` by blake3, so they are the same in every process. Raises CanaryError
    for numbers that no model has.
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
        """A probe as long as the longest text of a model, in positions, and at least `TOKENS` long."""
        return cls(vocabulary, max(TOKENS, longest_text))

    def __str__(self) -> str:
        return f"a text from {self.vocabulary} token ids over {self.length} positions"

    def token_ids(self) -> npt.NDArray[np.int64]:
        """`[TOKENS]`"""
        drawn = np.frombuffer(blake3(_DOMAIN).digest(length=8 * TOKENS), "<u8")
        return (drawn % np.uint64(self.vocabulary)).astype(np.int64)

    def positions(self) -> npt.NDArray[np.int64]:
        """`[TOKENS]`, ascending."""
        steps = np.arange(1, SPREAD_TOKENS + 1, dtype=np.int64)
        spread = NEAR_TOKENS - 1 + steps * (self.length - NEAR_TOKENS) // SPREAD_TOKENS
        return np.concatenate((np.arange(NEAR_TOKENS, dtype=np.int64), spread))


@dataclass(frozen=True, slots=True)
class Sample:
    """The part of the probe's KV that is kept: whole tokens of these layers, all heads and dimensions."""

    layers: tuple[int, ...]
    tokens: tuple[int, ...]
    """Indices into the probe, evenly spaced; the last one is its last token."""

    @classmethod
    def of(cls, spec: ModelSpec) -> Sample:
        """As much as fits into a few MB: up to 16 tokens of every layer, and where not even one token fits, one token
        of every n-th layer, the last layer among them. Raises CanaryError for a layer that does not fit either."""
        stride = -(-spec.kv_bytes_per_token // _MAX_KV_BYTES)
        layers = tuple(range(spec.layers - 1, -1, -stride))[::-1]
        token_bytes = len(layers) * (spec.kv_bytes_per_token // spec.layers)
        if token_bytes > _MAX_KV_BYTES:
            raise CanaryError(f"one token of {spec.model_id} has {token_bytes} bytes of KV in a layer")
        count = min(_MOST_TOKENS, _MAX_KV_BYTES // token_bytes)
        return cls(layers, tuple(TOKENS * (number + 1) // count - 1 for number in range(count)))
