"""How a chunk of KV is divided into frames of 64 tokens x one period (a group of consecutive layers)."""

from __future__ import annotations

from dataclasses import dataclass

from kvstore_codec.errors import ChunkFormatError
from kvstore_codec.identity import CHUNK_TOKENS
from kvstore_codec.model_spec import KVDtype, ModelSpec

# Limits far above any real model, and low enough that no field of an untrusted header can request a huge buffer.
MAX_LAYERS = 1024
MAX_KV_HEADS = 1024
MAX_HEAD_DIM = 4096
MAX_CHUNK_TOKENS = 65_536
# A storage node keeps the parsed header of every chunk, three numbers per frame, outside its memory limit.
MAX_FRAMES = 4_096
MAX_FRAME_VALUES = 1 << 26

FRAME_TOKENS = 64
PERIOD_LAYERS = 4


def period_layers_of(spec: ModelSpec, most: int = PERIOD_LAYERS) -> int:
    """The most layers a period may have, up to `most`, so that no period mixes layers with different sliding windows:
    `most` if all layers have the same, 1 for Gemma 3. A fetch leaves out the frames outside a window only where all
    layers of their period have one."""
    windows = spec.sliding_windows or (None,) * spec.layers
    return next(
        size
        for size in range(most, 0, -1)
        if all(len(set(windows[first : first + size])) == 1 for first in range(0, spec.layers, size))
    )


@dataclass(frozen=True, slots=True)
class Geometry:
    """Shape of a chunk. A slot is the token range of a frame. Frames are ordered by period, then by slot:
    frame = period * frames_per_period + slot. So the frames that a layer-wise fetch needs first come first.

    Raises ChunkFormatError for dimensions beyond the limits above.
    """

    layers: int
    kv_heads: int
    head_dim: int
    dtype: KVDtype
    tokens: int = CHUNK_TOKENS
    frame_tokens: int = FRAME_TOKENS
    period_layers: int = PERIOD_LAYERS

    def __post_init__(self) -> None:
        for name, value, limit in (
            ("layers", self.layers, MAX_LAYERS),
            ("kv_heads", self.kv_heads, MAX_KV_HEADS),
            ("head_dim", self.head_dim, MAX_HEAD_DIM),
            ("tokens", self.tokens, MAX_CHUNK_TOKENS),
            ("frame_tokens", self.frame_tokens, MAX_CHUNK_TOKENS),
            ("period_layers", self.period_layers, MAX_LAYERS),
        ):
            if not isinstance(value, int) or not 1 <= value <= limit:
                raise ChunkFormatError(f"a chunk with {name} = {value!r} is absurd: expected 1 to {limit}")
        if self.frame_count > MAX_FRAMES:
            raise ChunkFormatError(f"a chunk of {self.frame_count} frames is absurd: at most {MAX_FRAMES}")
        if self.frame_values(0) > MAX_FRAME_VALUES:
            raise ChunkFormatError(
                f"a frame of {self.frame_values(0)} values is absurd: at most {MAX_FRAME_VALUES}"
            )

    @classmethod
    def of(
        cls,
        spec: ModelSpec,
        tokens: int = CHUNK_TOKENS,
        period_layers: int = PERIOD_LAYERS,
        frame_tokens: int = FRAME_TOKENS,
    ) -> Geometry:
        return cls(spec.layers, spec.kv_heads, spec.head_dim, spec.dtype, tokens, frame_tokens, period_layers)

    @property
    def periods(self) -> int:
        return -(-self.layers // self.period_layers)

    @property
    def frames_per_period(self) -> int:
        return -(-self.tokens // self.frame_tokens)

    @property
    def frame_count(self) -> int:
        return self.periods * self.frames_per_period

    def layers_of(self, period: int) -> range:
        """Layers of a period. The last period may be shorter."""
        first = period * self.period_layers
        return range(first, min(first + self.period_layers, self.layers))

    def tokens_of(self, slot: int) -> range:
        """Token indices within the chunk of a slot. The last slot may be shorter."""
        first = slot * self.frame_tokens
        return range(first, min(first + self.frame_tokens, self.tokens))

    def frame_shape(self, frame: int) -> tuple[int, int, int, int]:
        """Shape of the K, and of the V, of a frame: [layers_in_period, kv_heads, tokens_in_frame, head_dim]."""
        period, slot = divmod(frame, self.frames_per_period)
        return len(self.layers_of(period)), self.kv_heads, len(self.tokens_of(slot)), self.head_dim

    def frame_values(self, frame: int) -> int:
        """Number of values in a frame, K and V together."""
        layers, heads, tokens, dim = self.frame_shape(frame)
        return 2 * layers * heads * tokens * dim
