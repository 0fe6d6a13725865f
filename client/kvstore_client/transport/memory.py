"""Where received bytes lie: memory that was touched before, given back by itself."""

import weakref
from collections import deque

import numpy as np
from numpy.typing import NDArray

LARGEST_BYTES = 32 << 20
_SMALLEST_BYTES = 64 << 10
_KEPT_BYTES = 64 << 20
"""Of each size: what a fetch may have waiting for its decoder."""


class ReceiveMemory:
    """Lends memory until nobody refers to it any more, and then lends it again. Thread-safe.

    The first write to fresh pages runs at 1-2 GB/s, warm memory takes 25 GB/s. Sizes are powers of two, so that what
    one range leaves fits the next.
    """

    def __init__(self) -> None:
        # Memory may come back in the middle of anything, whenever an object is collected: appending to a deque and
        # popping from it take no lock, and a full one drops what is oldest.
        self._free: dict[int, deque[NDArray[np.uint8]]] = {}
        size_bytes = _SMALLEST_BYTES
        while size_bytes <= LARGEST_BYTES:
            self._free[size_bytes] = deque(maxlen=_KEPT_BYTES // size_bytes)
            size_bytes *= 2

    def take(self, size_bytes: int) -> memoryview:
        """`size_bytes` writable bytes, at most LARGEST_BYTES. They are lent for as long as the view or a slice of it
        exists."""
        if size_bytes < _SMALLEST_BYTES // 2:
            return memoryview(bytearray(size_bytes))
        free = self._free[max(_SMALLEST_BYTES, 1 << (size_bytes - 1).bit_length())]
        try:
            memory = free.pop()
        except IndexError:
            memory = np.empty(max(_SMALLEST_BYTES, 1 << (size_bytes - 1).bit_length()), np.uint8)
        lent = memory[:size_bytes]
        weakref.finalize(lent, free.append, memory).atexit = False
        return lent.data
