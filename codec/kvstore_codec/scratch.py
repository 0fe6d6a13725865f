"""Scratch memory that each thread keeps, because allocating fresh pages costs more than the work done in them."""

from __future__ import annotations

import math
import threading
from typing import TypeVar

import numpy as np
import numpy.typing as npt

_Scalar = TypeVar("_Scalar", bound=np.generic)


class ThreadScratch(threading.local):
    """One buffer per thread. It grows to the largest array that was requested."""

    def __init__(self) -> None:
        self._buffer = np.empty(0, np.uint8)

    def array(self, shape: tuple[int, ...], dtype: type[_Scalar]) -> npt.NDArray[_Scalar]:
        """Returns an uninitialised array. It is valid until this thread calls `array` on this object again."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if size > self._buffer.nbytes:
            self._buffer = np.empty(size, np.uint8)
        return self._buffer[:size].view(dtype).reshape(shape)
