"""Reading the bytes of one frame: nothing is taken that is not there."""

from __future__ import annotations

import struct
from enum import IntEnum

from typing_extensions import Buffer

from kvstore_codec.errors import ChunkFormatError, TruncatedChunkError


class PayloadKind(IntEnum):
    """First byte of a frame: how the rest is to be read."""

    VERBATIM = 0  # K, then V, as they lie in memory
    BYTE_PLANES = 1  # see `words`
    QUANTISED = 2  # see `quantise`
    KLT = 3  # see `klt_frames`


class PayloadReader:
    """Walks through a frame's bytes without copying them. Raises TruncatedChunkError past the end."""

    def __init__(self, data: Buffer) -> None:
        self._rest = memoryview(data).cast("B")

    def take(self, length: int) -> memoryview:
        if length > self._rest.nbytes:
            raise TruncatedChunkError(f"a frame promises {length} more bytes, {self._rest.nbytes} are there")
        taken, self._rest = self._rest[:length], self._rest[length:]
        return taken

    def take_rest(self) -> memoryview:
        return self.take(self._rest.nbytes)

    def unpack(self, layout: struct.Struct) -> tuple[int, ...]:
        return layout.unpack(self.take(layout.size))

    def kind(self) -> PayloadKind:
        code = self.take(1)[0]
        try:
            return PayloadKind(code)
        except ValueError:
            raise ChunkFormatError(f"a frame of unknown kind {code}") from None

    def finish(self) -> None:
        if self._rest.nbytes:
            raise ChunkFormatError(f"a frame has {self._rest.nbytes} bytes too many")
