"""The bytes of one frame.

    kind u8 | checksum of the decoded samples u64 | what the kind says

The checksum covers what coders make of their bytes, so that a coder which conceals damage, or gives something else
than the encoder meant, is found out, whichever coder it is. It is xxh3_64 over 256 zero bytes and then the samples of
every coded plane of the frame, u8 in C order, plane after plane. The bytes that no coder touches (verbatim words, plain
planes, steps, escapes) are those that the checksum of the frame in the chunk's header covers.
"""

from __future__ import annotations

import struct
from enum import IntEnum

import numpy as np
import numpy.typing as npt
import xxhash
from typing_extensions import Buffer

from kvstore_codec.errors import ChunkFormatError, SampleMismatchError, TruncatedChunkError

Samples = npt.NDArray[np.uint8]

_OPENING = struct.Struct("<BQ")
OPENING_BYTES = _OPENING.size
# Of an input up to 240 bytes, xxh3 multiplies neighbouring words: a word that the writer chooses can make the product
# zero and so hide what its neighbour holds. Behind more bytes than that, every word reaches the digest by itself.
_LEAD = bytes(256)


class PayloadKind(IntEnum):
    """First byte of a frame: how the rest is to be read."""

    VERBATIM = 0  # K, then V, as they lie in memory
    BYTE_PLANES = 1  # see `words`
    QUANTISED = 2  # see `quantise`
    KLT = 3  # see `klt_frames`


class _SampleChecksum:
    """Of the samples of a frame's coded planes, in the order in which they are given."""

    def __init__(self) -> None:
        self._hasher = xxhash.xxh3_64(_LEAD)

    def update(self, samples: Samples) -> None:
        """`samples` is C-contiguous, of any shape."""
        self._hasher.update(samples.data)

    @property
    def value(self) -> int:
        return int(self._hasher.intdigest())


def sample_checksum(*planes: Samples) -> int:
    """What the frame of these coded planes says of them."""
    checksum = _SampleChecksum()
    for plane in planes:
        checksum.update(plane)
    return checksum.value


class PayloadWriter:
    """Collects the bytes of one frame."""

    def __init__(self, kind: PayloadKind) -> None:
        self._kind = kind
        self._checksum = _SampleChecksum()
        self._parts: list[Buffer] = []

    def add(self, *parts: Buffer) -> None:
        """Appends bytes that are read as they are."""
        self._parts += parts

    def add_coded(self, coded: Buffer, samples: Samples) -> None:
        """Appends a plane, coded, of these `samples`, which are C-contiguous."""
        self._checksum.update(samples)
        self._parts.append(coded)

    def frame(self) -> bytes:
        return b"".join((_OPENING.pack(self._kind, self._checksum.value), *self._parts))


class PayloadReader:
    """Walks through a frame's bytes without copying them. Raises TruncatedChunkError past the end."""

    def __init__(self, data: Buffer) -> None:
        """Raises ChunkFormatError for a frame of an unknown kind."""
        self._rest = memoryview(data).cast("B")
        self._checksum = _SampleChecksum()
        code, self._expected_checksum = self.unpack(_OPENING)
        try:
            self.kind = PayloadKind(code)
        except ValueError:
            raise ChunkFormatError(f"a frame of unknown kind {code}") from None

    def take(self, length: int) -> memoryview:
        if length > self._rest.nbytes:
            raise TruncatedChunkError(f"a frame promises {length} more bytes, {self._rest.nbytes} are there")
        taken, self._rest = self._rest[:length], self._rest[length:]
        return taken

    def take_rest(self) -> memoryview:
        return self.take(self._rest.nbytes)

    def unpack(self, layout: struct.Struct) -> tuple[int, ...]:
        return layout.unpack(self.take(layout.size))

    def decoded(self, samples: Samples) -> None:
        """A coder has decoded a plane of the frame to these `samples`, C-contiguous. Every plane that went through
        `PayloadWriter.add_coded` has to come back through here, in the same order."""
        self._checksum.update(samples)

    def finish(self) -> None:
        """What was decoded may be used after this, and not before.

        Raises ChunkFormatError when bytes are left over, SampleMismatchError when coders gave other samples than were
        encoded."""
        if self._rest.nbytes:
            raise ChunkFormatError(f"a frame has {self._rest.nbytes} bytes too many")
        found = self._checksum.value
        if found != self._expected_checksum:
            raise SampleMismatchError(found, self._expected_checksum)
