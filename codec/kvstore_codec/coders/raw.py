"""No compression: for links that outrun every decoder."""

from __future__ import annotations

import numpy as np

from kvstore_codec.coders.base import Coder, Data, Plane
from kvstore_codec.errors import ChunkFormatError


class RawCoder(Coder):
    def encode(self, plane: Plane) -> bytes:
        return plane.tobytes()

    def decode(self, data: Data, shape: tuple[int, int]) -> Plane:
        plane = np.frombuffer(data, np.uint8)
        if plane.size != shape[0] * shape[1]:
            raise ChunkFormatError(f"{plane.size} raw bytes are not a plane of {shape[0]} x {shape[1]}")
        return plane.reshape(shape)
