"""KVFetcher's picture layout: a token is a tile, three layers are the planes of 4:4:4, and consecutive tokens are in
consecutive pictures.

The heads x head_dim integers of one token and layer form a rectangle, the tile. Heads are arranged in rows and columns,
and each head's dimensions in rows and columns within it, without reordering. The best arrangement depends on the model
and is searched for once per model shape. Token t is in picture t % pictures, at place t // pictures of its grid, so
inter prediction finds the previous token at the same place. The resolution is the number of tiles in a picture: fewer,
larger pictures or more, smaller ones, with the same integers.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

import numpy as np
import numpy.typing as npt

from kvstore_codec.coders.base import Data
from kvstore_codec.coders.hevc.base import HevcCoder, Prediction
from kvstore_codec.coders.hevc.pictures import PADDING, Pictures, picture_side
from kvstore_codec.errors import ChunkFormatError, InvalidKVError

# [layers, kv_heads, tokens, head_dim], any strides.
Samples = npt.NDArray[np.uint8]

LAYERS_PER_PICTURE = 3
_TILING = struct.Struct("<HH")  # head rows, dimension rows


class Resolution(Enum):
    """Largest size of a picture of several tiles, (width, height). A picture of one tile may be larger."""

    P144 = (256, 144)
    P240 = (426, 240)
    P480 = (854, 480)
    P1080 = (1920, 1080)


@dataclass(frozen=True, slots=True)
class Tiling:
    """`head_rows` x `head_cols` heads, each of `dim_rows` x `dim_cols` dimensions."""

    head_rows: int
    head_cols: int
    dim_rows: int
    dim_cols: int

    @property
    def height(self) -> int:
        return self.head_rows * self.dim_rows

    @property
    def width(self) -> int:
        return self.head_cols * self.dim_cols


def tilings(kv_heads: int, head_dim: int) -> list[Tiling]:
    """All possible tilings for `kv_heads` heads of `head_dim` dimensions."""
    return [
        Tiling(head_rows, kv_heads // head_rows, dim_rows, head_dim // dim_rows)
        for head_rows in _divisors(kv_heads)
        for dim_rows in _divisors(head_dim)
    ]


@dataclass(frozen=True, slots=True)
class TokenFrames:
    """Layout of samples of `shape`, [layers, kv_heads, tokens, head_dim], as pictures.

    Raises InvalidKVError for a tiling that does not cover kv_heads x head_dim.
    """

    shape: tuple[int, int, int, int]
    tiling: Tiling
    resolution: Resolution = Resolution.P240

    def __post_init__(self) -> None:
        _, kv_heads, _, head_dim = self.shape
        tiling = self.tiling
        made = tiling.head_rows * tiling.head_cols, tiling.dim_rows * tiling.dim_cols
        if min(self.shape) < 1 or made != (kv_heads, head_dim):
            raise InvalidKVError(f"{tiling} does not tile samples of shape {self.shape}")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tiles in a picture, no more than the tokens fill."""
        width, height = self.resolution.value
        tokens = self.shape[2]
        cols = min(max(1, width // self.tiling.width), tokens)
        return min(max(1, height // self.tiling.height), -(-tokens // cols)), cols

    @property
    def pictures_per_group(self) -> int:
        """Number of pictures for all tokens of three layers (a group)."""
        rows, cols = self.grid
        return -(-self.shape[2] // (rows * cols))

    @property
    def pictures_shape(self) -> tuple[int, int, int, int]:
        """[pictures, 3, height, width], ordered by group of three layers, then by picture within the group."""
        rows, cols = self.grid
        groups = -(-self.shape[0] // LAYERS_PER_PICTURE)
        return (
            groups * self.pictures_per_group,
            LAYERS_PER_PICTURE,
            picture_side(rows * self.tiling.height),
            picture_side(cols * self.tiling.width),
        )

    def encode(self, samples: Samples, coder: HevcCoder, prediction: Prediction = Prediction.INTRA) -> bytes:
        """Codes `samples`, which has the layout's `shape`."""
        return coder.encode_pictures(self.pictures(samples), prediction)

    def decode(self, data: Data, coder: HevcCoder, out: Samples) -> None:
        """Fills `out`, which has the layout's `shape`. Raises ChunkFormatError if `data` is not such samples."""
        self._require_shape(out)
        pictures = np.empty(self.pictures_shape, np.uint8)
        coder.decode_pictures(data, pictures)
        for place, tokens in self._places(pictures, out):
            tokens[...] = place

    def pictures(self, samples: Samples) -> Pictures:
        """Pictures of `samples`. Places without a token and planes without a layer are padding."""
        self._require_shape(samples)
        pictures = np.full(self.pictures_shape, PADDING, np.uint8)
        for place, tokens in self._places(pictures, samples):
            place[...] = tokens
        return pictures

    def _require_shape(self, samples: Samples) -> None:
        if samples.shape != self.shape or samples.dtype != np.uint8:
            raise InvalidKVError(f"{samples.dtype} {samples.shape} instead of uint8 {self.shape}")

    def _places(self, pictures: Pictures, samples: Samples) -> Iterator[tuple[Pictures, Samples]]:
        """Pairs of views of equal shape, [pictures, layers, head_rows, dim_rows, head_cols, dim_cols]: one place of the
        grid in all pictures of a group, and the tokens at that place."""
        layers, _, tokens, _ = self.shape
        tiling, per_group, (_, cols) = self.tiling, self.pictures_per_group, self.grid
        heads = tiling.head_rows, tiling.head_cols
        dims = tiling.dim_rows, tiling.dim_cols
        for group, first_layer in enumerate(range(0, layers, LAYERS_PER_PICTURE)):
            of_group = samples[first_layer : first_layer + LAYERS_PER_PICTURE]
            for number, first in enumerate(range(0, tokens, per_group)):
                part = of_group[:, :, first : first + per_group]
                planes, _, count, _ = part.shape
                tiles = part.reshape(planes, *heads, count, *dims).transpose(3, 0, 1, 4, 2, 5)
                top, left = number // cols * tiling.height, number % cols * tiling.width
                place = pictures[
                    group * per_group : group * per_group + count,
                    :planes,
                    top : top + tiling.height,
                    left : left + tiling.width,
                ]
                shape = (count, planes, heads[0], dims[0], heads[1], dims[1])
                yield place.reshape(shape), tiles


def encode_token_frames(samples: Samples, coder: HevcCoder) -> bytes:
    """Codes `samples`, [layers, kv_heads, tokens, head_dim]. The result begins with the tiling.

    All tokens are put into one picture if a resolution has room for them. The tiling is searched for once per process
    and shape, on the first samples with that number of heads and dimensions.
    """
    shape = _shape(samples)
    key = shape[1], shape[3]
    if key not in _found_tilings:
        few = samples[:LAYERS_PER_PICTURE, :, :_SEARCH_TOKENS]
        _found_tilings[key] = search_tiling(few, coder)
    tiling = _found_tilings[key]
    layout = TokenFrames(shape, tiling, _resolution(shape, tiling))
    return _TILING.pack(tiling.head_rows, tiling.dim_rows) + layout.encode(samples, coder)


def decode_token_frames(data: memoryview, coder: HevcCoder, out: Samples) -> None:
    """Inverse of `encode_token_frames`: fills `out`. Raises ChunkFormatError if `data` is not such samples."""
    shape = _shape(out)
    if data.nbytes < _TILING.size:
        raise ChunkFormatError("token frames lack their tiling")
    head_rows, dim_rows = _TILING.unpack_from(data)
    if not head_rows or not dim_rows or shape[1] % head_rows or shape[3] % dim_rows:
        raise ChunkFormatError(
            f"{head_rows} head rows and {dim_rows} dimension rows do not tile {shape[1]} heads of {shape[3]}"
        )
    tiling = Tiling(head_rows, shape[1] // head_rows, dim_rows, shape[3] // dim_rows)
    TokenFrames(shape, tiling, _resolution(shape, tiling)).decode(data[_TILING.size :], coder, out)


_found_tilings: dict[tuple[int, int], Tiling] = {}
_SEARCH_TOKENS = 32


def _resolution(shape: tuple[int, int, int, int], tiling: Tiling) -> Resolution:
    """The smallest resolution whose picture has room for all tokens, or the largest if none has."""
    for resolution in Resolution:
        if TokenFrames(shape, tiling, resolution).pictures_per_group == 1:
            return resolution
    return Resolution.P1080


def search_tiling(
    samples: Samples,
    coder: HevcCoder,
    resolution: Resolution = Resolution.P240,
    prediction: Prediction = Prediction.INTRA,
) -> Tiling:
    """The tiling that codes `samples`, [layers, kv_heads, tokens, head_dim], in the fewest bytes. It tries every
    tiling, so pass only a few dozen tokens."""
    shape = _shape(samples)
    return min(
        tilings(shape[1], shape[3]),
        key=lambda tiling: len(TokenFrames(shape, tiling, resolution).encode(samples, coder, prediction)),
    )


def _shape(samples: Samples) -> tuple[int, int, int, int]:
    if samples.ndim != 4:
        raise InvalidKVError(f"samples of shape {samples.shape} are not [layers, kv_heads, tokens, head_dim]")
    layers, kv_heads, tokens, head_dim = samples.shape
    return layers, kv_heads, tokens, head_dim


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
