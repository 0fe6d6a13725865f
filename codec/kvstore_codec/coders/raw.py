"""Coder without compression, for links that are faster than every decoder."""

from __future__ import annotations

import numpy as np

from kvstore_codec.coders.base import Coder, Data, Plane
from kvstore_codec.errors import ChunkFormatError


class RawCoder(Coder):
    def encode(self, plane: Plane) -> bytes:
        return plane.tobytes()

    def decode(self, data: Data, out: Plane) -> None:
        if len(data) != out.nbytes:
            raise ChunkFormatError(f"{len(data)} raw bytes are not a plane of {out.nbytes} bytes")
        out[...] = np.frombuffer(data, np.uint8).reshape(out.shape)
