"""Pool of receive memory, which returns by itself."""

import weakref
from collections import deque

import numpy as np
from numpy.typing import NDArray

LARGEST_BYTES = 32 << 20
_SMALLEST_BYTES = 64 << 10
_KEPT_BYTES = 64 << 20
"""Limit on pooled memory in total: what a fetch may queue for its decoder."""


class ReceiveMemory:
    """Lends memory until nothing refers to it any more, then lends it again. Thread-safe.

    The first write to fresh pages runs at 1-2 GB/s, warm memory takes 25 GB/s. Sizes are powers of two, so that memory
    of one range fits the next.
    """

    def __init__(self) -> None:
        # Memory may return at any time, whenever an object is collected: deque.append and deque.pop take no lock.
        self._free: dict[int, deque[NDArray[np.uint8]]] = {}
        size_bytes = _SMALLEST_BYTES
        while size_bytes <= LARGEST_BYTES:
            self._free[size_bytes] = deque()
            size_bytes *= 2

    def take(self, size_bytes: int) -> memoryview:
        """`size_bytes` writable bytes, at most LARGEST_BYTES. They are lent as long as the view or a slice of it
        exists."""
        if size_bytes < _SMALLEST_BYTES // 2:
            return memoryview(bytearray(size_bytes))
        whole_bytes = max(_SMALLEST_BYTES, 1 << (size_bytes - 1).bit_length())
        try:
            memory = self._free[whole_bytes].pop()
        except IndexError:
            memory = np.empty(whole_bytes, np.uint8)
        lent = memory[:size_bytes]
        weakref.finalize(lent, self._keep, memory).atexit = False
        return lent.data

    def _keep(self, memory: NDArray[np.uint8]) -> None:
        kept_bytes = sum(len(free) * size_bytes for size_bytes, free in self._free.items())
        if kept_bytes + memory.nbytes <= _KEPT_BYTES:
            self._free[memory.nbytes].append(memory)
