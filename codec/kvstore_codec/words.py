"""Bit-exact coding of 16- and 32-bit floats as byte planes.

The upper byte of a float holds the sign and (most of) the exponent and compresses well. Mantissa bits are
noise. So each word is split into planes: the upper byte, the second byte and, for 32 bits, the lower half. A
plane is coded only if coding saves at least a sixteenth of its bytes (on KV of SmolLM2 the upper byte shrinks from
8 to 2.9 bits, and the other planes are not coded). Other planes are stored plainly and read in place.

    plane = coder used (0 none, 1 zstd) u8 | length u32 | bytes
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from typing import cast

import numpy as np
import numpy.typing as npt
import torch

from kvstore_codec.coders import Plane, coder
from kvstore_codec.errors import ChunkFormatError
from kvstore_codec.payload import PayloadReader, PayloadWriter
from kvstore_codec.scratch import ThreadScratch

Words = npt.NDArray[np.unsignedinteger]

_WORD_DTYPES = {
    2: (torch.int16, np.uint16),
    4: (torch.int32, np.uint32),
}
_PLANE = struct.Struct("<BI")
_PLAIN, _ZSTD = 0, 1
# Code a plane only if the result is smaller than this fraction of it; otherwise reading it in place is faster.
_WORTHWHILE = 15 / 16

_UPPER, _SECOND, _LOWER, _UPPER_HALF = (ThreadScratch() for _ in range(4))


def words_of(tensor: torch.Tensor) -> Words:
    """View of a float tensor in host memory as unsigned integers with the same bits."""
    integers, words = _WORD_DTYPES[tensor.dtype.itemsize]
    view: Words = tensor.view(integers).numpy().view(words)
    return view


def encode_words(words: Words, writer: PayloadWriter) -> None:
    """Appends the planes of `words` to the frame. `words` is C-contiguous and has any shape."""
    for plane in _planes(words):
        coded = coder("zstd").encode(plane)
        if len(coded) > _WORTHWHILE * plane.nbytes:
            writer.add(_PLANE.pack(_PLAIN, plane.nbytes), plane.data)
        else:
            writer.add(_PLANE.pack(_ZSTD, len(coded)))
            writer.add_coded(coded, plane)


def decode_words(reader: PayloadReader, out: Words) -> None:
    """Decodes the next planes into `out`, an array with any strides.

    Raises ChunkFormatError if the planes do not hold exactly as many words as `out`.
    """
    upper = _read_plane(reader, out.shape, np.uint8, _UPPER)
    second = _read_plane(reader, out.shape, np.uint8, _SECOND)
    if out.itemsize == 2:
        _join_bytes(upper, second, out)
        return
    lower = _read_plane(reader, out.shape, np.uint16, _LOWER)
    upper_half = _UPPER_HALF.array(out.shape, np.uint16)
    _join_bytes(upper, second, upper_half)
    np.multiply(upper_half, np.uint32(1 << 16), out=out, dtype=np.uint32)
    np.bitwise_or(out, lower, out=out, dtype=np.uint32)


def _join_bytes(upper: Words, second: Words, out: Words) -> None:
    # The product casts and shifts in one pass. `out` is still in the CPU cache for the second pass.
    np.multiply(upper, np.uint16(1 << 8), out=out, dtype=np.uint16)
    np.bitwise_or(out, second, out=out, dtype=np.uint16)


def _planes(words: Words) -> Iterator[Plane]:
    """Planes of `words`, one row each: upper bytes, second bytes and, for 32-bit words, lower halves."""
    columns = words.reshape(-1, 1).view(np.uint8)
    yield np.ascontiguousarray(columns[:, -1]).reshape(1, -1)
    yield np.ascontiguousarray(columns[:, -2]).reshape(1, -1)
    if words.itemsize == 4:
        yield np.ascontiguousarray(columns[:, :2]).reshape(1, -1)


def _read_plane(
    reader: PayloadReader, shape: tuple[int, ...], dtype: type[np.uint8 | np.uint16], scratch: ThreadScratch
) -> Words:
    used, length = reader.unpack(_PLANE)
    data = reader.take(length)
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if used == _ZSTD:
        plane = scratch.array((1, size), np.uint8)
        coder("zstd").decode(data, plane)
        reader.decoded(plane)
    elif used == _PLAIN and length == size:
        plane = np.frombuffer(data, np.uint8)
    else:
        raise ChunkFormatError(f"a plane of {length} bytes, coded as {used}, does not hold {size} bytes")
    return cast("Words", plane.reshape(-1).view(dtype).reshape(shape))
