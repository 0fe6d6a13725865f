"""The contract of a coder: it turns planes of 8-bit samples into bytes and back, and knows nothing of KV."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import numpy.typing as npt

Plane = npt.NDArray[np.uint8]
Data = bytes | bytearray | memoryview


class Coder(ABC):
    """Lossless. One instance serves all threads; what is not thread-safe inside is kept per thread."""

    @abstractmethod
    def encode(self, plane: Plane) -> bytes:
        """`plane` is C-contiguous, [rows, cols]. Each call stands alone: no state passes between planes."""

    @abstractmethod
    def decode(self, data: Data, out: Plane) -> None:
        """Fills `out`, C-contiguous [rows, cols], with the plane that `data` was made from.

        Allocates in proportion to `out`, never to what `data` claims, and gives up the GIL while it works.
        Raises ChunkFormatError when `data` cannot be such a plane.
        """
