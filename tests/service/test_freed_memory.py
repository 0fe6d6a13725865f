"""Memory that becomes free in a process is returned to the system, also between allocations that stay."""

import ctypes
import subprocess
import sys

import pytest

# In a process of its own, because a test process has free memory of earlier tests, which the blocks would take.
CODE = """
import ctypes, time
import psutil
from kvstore_service import freed_memory

def used():
    return psutil.Process().memory_info().rss

freed_memory._PERIOD_S = 0.05
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
memory = freed_memory.FreedMemory()
for _ in range(2):  # the second time into what was returned
    most = used() + (40 << 20)  # up to 32 MiB may stay, and be kept in use
    blocks = [libc.malloc(4000) for _ in range(40_000)]
    for block in blocks:
        ctypes.memset(block, 1, 4000)
    assert used() > most
    for block in blocks[:-1]:
        libc.free(block)
    deadline_s = time.monotonic() + 20
    while used() > most:
        assert time.monotonic() < deadline_s, used() - most
        time.sleep(0.02)
    libc.free(blocks[-1])
memory.stop()
"""


def test_memory_between_allocations_is_returned() -> None:
    if not hasattr(ctypes.CDLL(None), "mallinfo2"):
        pytest.skip("this system has no glibc 2.33")
    subprocess.run([sys.executable, "-c", CODE], check=True, timeout=120)
