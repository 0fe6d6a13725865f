"""Memory that fails."""

import ctypes

import numpy as np


def flip_bit(view: memoryview) -> None:
    """Turn over a bit in the middle of read-only memory, as failing hardware would."""
    address = np.frombuffer(view, np.uint8).ctypes.data + len(view) // 2
    ctypes.c_ubyte.from_address(address).value ^= 0x10
