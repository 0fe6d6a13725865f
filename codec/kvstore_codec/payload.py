"""Reading and writing the bytes of one frame.

    kind u8 | checksum of the decoded samples u64 | fields of the kind

The checksum covers the output of the coders. It detects a coder that conceals damage or returns samples other than
those that were encoded. It is xxh3_64 over 256 zero bytes followed by the samples of every coded plane of the frame,
u8 in C order, plane after plane. Bytes that are not coded (verbatim words, plain planes, steps, escapes) are covered by
the frame's checksum in the chunk's header instead.
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
# For inputs of up to 240 bytes, xxh3 multiplies adjacent words: a word that the writer chooses can make the product
# zero and so hide the value of the next word. After more bytes than that, every word affects the digest by itself.
_LEAD = bytes(256)


class PayloadKind(IntEnum):
    """First byte of a frame. It gives the format of the rest."""

    VERBATIM = 0  # K, then V, as in memory
    BYTE_PLANES = 1  # see `words`
    QUANTISED = 2  # see `quantise`
    KLT = 3  # see `klt_frames`
    PAGE = 4  # not KV, but a page of an engine's cache: see `page`


class _SampleChecksum:
    """Checksum of the samples of a frame's coded planes, in the order of the `update` calls."""

    def __init__(self) -> None:
        self._hasher = xxhash.xxh3_64(_LEAD)

    def update(self, samples: Samples) -> None:
        """`samples` is C-contiguous, of any shape."""
        self._hasher.update(samples.data)

    @property
    def value(self) -> int:
        return int(self._hasher.intdigest())


def sample_checksum(*planes: Samples) -> int:
    """The sample checksum of a frame with these coded planes."""
    checksum = _SampleChecksum()
    for plane in planes:
        checksum.update(plane)
    return checksum.value


def opening(kind: PayloadKind, checksum: int) -> bytes:
    """The first OPENING_BYTES of a frame; `checksum` is that of its samples."""
    return _OPENING.pack(kind, checksum)


class PayloadWriter:
    """Collects the bytes of one frame."""

    def __init__(self, kind: PayloadKind) -> None:
        self._kind = kind
        self._checksum = _SampleChecksum()
        self._parts: list[Buffer] = []

    def add(self, *parts: Buffer) -> None:
        """Appends bytes that are stored without coding."""
        self._parts += parts

    def add_coded(self, coded: Buffer, samples: Samples) -> None:
        """Appends `coded`, the coded form of the plane `samples`, which is C-contiguous."""
        self._checksum.update(samples)
        self._parts.append(coded)

    def frame(self) -> bytes:
        return b"".join((opening(self._kind, self._checksum.value), *self._parts))


class PayloadReader:
    """Reads a frame's bytes in order, without copying them. Raises TruncatedChunkError past the end."""

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
            raise TruncatedChunkError(
                f"a frame needs {length} more bytes, but only {self._rest.nbytes} are left"
            )
        taken, self._rest = self._rest[:length], self._rest[length:]
        return taken

    def take_rest(self) -> memoryview:
        return self.take(self._rest.nbytes)

    def unpack(self, layout: struct.Struct) -> tuple[int, ...]:
        return layout.unpack(self.take(layout.size))

    def decoded(self, samples: Samples) -> None:
        """Adds the decoded `samples` of a plane, C-contiguous, to the checksum. Call it for every plane that
        `PayloadWriter.add_coded` wrote, in the same order."""
        self._checksum.update(samples)

    def finish(self) -> None:
        """Verifies the frame. Use its decoded samples only after this.

        Raises ChunkFormatError if bytes are left over, SampleMismatchError if the decoded samples differ from the
        encoded ones."""
        if self._rest.nbytes:
            raise ChunkFormatError(f"a frame has {self._rest.nbytes} bytes too many")
        found = self._checksum.value
        if found != self._expected_checksum:
            raise SampleMismatchError(found, self._expected_checksum)
