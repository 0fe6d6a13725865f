"""Bit-exact coding of 16- and 32-bit floats as byte planes.

The upper byte of a float holds the sign and (most of) the exponent and compresses well; mantissa bits are
noise. So words are cut into planes: upper byte, second byte and, for 32 bits, the lower half as it is. Each
plane is coded only if that makes it smaller by a real margin (on KV of SmolLM2 the upper byte goes from 8 to
2.9 bits and the others stay), else stored plainly and read in place.

    plane = coder used (0 none, 1 zstd) u8 | length u32 | bytes
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from kvstore_codec.coders import Plane, coder
from kvstore_codec.errors import ChunkFormatError
from kvstore_codec.payload import PayloadReader

Words = npt.NDArray[np.unsignedinteger]

_PLANE = struct.Struct("<BI")
_PLAIN, _ZSTD = 0, 1
# Below this saving, reading a plane in place is worth more than its bytes.
_WORTHWHILE = 15 / 16
_LOWER_HALF = np.dtype("<u2")


def encode_words(words: Words) -> list[bytes]:
    """The planes of `words` (C-contiguous, any shape), as parts to be joined."""
    parts: list[bytes] = []
    for plane in _planes(words):
        coded, used = coder("zstd").encode(plane), _ZSTD
        if len(coded) > _WORTHWHILE * plane.nbytes:
            coded, used = plane.tobytes(), _PLAIN
        parts += [_PLANE.pack(used, len(coded)), coded]
    return parts


def decode_words(reader: PayloadReader, out: Words) -> None:
    """Writes words of the shape of `out` into `out`, whatever its strides.

    Raises ChunkFormatError when the planes do not hold exactly that many words.
    """
    upper = _read_plane(reader, out.size, 1).reshape(out.shape)
    second = _read_plane(reader, out.size, 1).reshape(out.shape)
    if out.itemsize == _LOWER_HALF.itemsize:
        _join_bytes(upper, second, out)
        return
    lower = _read_plane(reader, out.size, _LOWER_HALF.itemsize).view(_LOWER_HALF).reshape(out.shape)
    upper_half = np.empty(out.shape, _LOWER_HALF)
    _join_bytes(upper, second, upper_half)
    # A product casts and shifts in one pass; the second pass finds `out` still in the cache.
    np.multiply(upper_half, np.uint32(1 << 16), out=out, dtype=np.uint32)
    np.bitwise_or(out, lower, out=out, dtype=np.uint32)


def _join_bytes(upper: Plane, second: Plane, out: Words) -> None:
    np.multiply(upper, np.uint16(1 << 8), out=out, dtype=np.uint16)
    np.bitwise_or(out, second, out=out, dtype=np.uint16)


def _planes(words: Words) -> Iterator[Plane]:
    columns = words.reshape(-1, 1).view(np.uint8)
    last = words.itemsize - 1
    yield np.ascontiguousarray(columns[:, last]).reshape(1, -1)
    yield np.ascontiguousarray(columns[:, last - 1]).reshape(1, -1)
    if last > 1:
        yield np.ascontiguousarray(words.reshape(-1, 1).view(_LOWER_HALF)[:, 0]).view(np.uint8).reshape(1, -1)


def _read_plane(reader: PayloadReader, words: int, bytes_per_word: int) -> Plane:
    used, length = reader.unpack(_PLANE)
    if used not in (_PLAIN, _ZSTD):
        raise ChunkFormatError(f"a plane of words is coded in an unknown way ({used})")
    plane = coder("zstd" if used == _ZSTD else "raw").decode(reader.take(length), (1, words * bytes_per_word))
    return plane.reshape(-1)
