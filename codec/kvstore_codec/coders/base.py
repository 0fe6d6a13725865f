"""Interface of a coder. A coder turns planes of 8-bit samples into bytes and back; it does not depend on KV."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import numpy.typing as npt

Plane = npt.NDArray[np.uint8]
Data = bytes | bytearray | memoryview


class Coder(ABC):
    """Lossless coder. All threads share one instance; state that is not thread-safe is kept per thread."""

    @abstractmethod
    def encode(self, plane: Plane) -> bytes:
        """Codes `plane`, C-contiguous [rows, cols]. Calls are independent: no state passes between planes."""

    @abstractmethod
    def decode(self, data: Data, out: Plane) -> None:
        """Fills `out`, C-contiguous [rows, cols], with the plane that was coded as `data`.

        Allocates memory in proportion to `out`, never to a size that `data` claims. Releases the GIL while it works.
        Raises ChunkFormatError if `data` is not a plane of this shape.
        """
