"""Memory that becomes free in a process is returned to the system, also between allocations that stay."""

import ctypes

import psutil
import pytest

from kvstore_service import freed_memory
from kvstore_service.freed_memory import FreedMemory
from tests.service.storage_calls import wait_until

BLOCK_BYTES, BLOCKS = 4000, 20_000
NOISE_BYTES = 16 << 20


def test_memory_between_allocations_is_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(freed_memory, "_PERIOD_S", 0.05)
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        pytest.skip("this system has no glibc 2.33")
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    memory = FreedMemory()
    for _ in range(2):  # the second time into what was returned
        most = psutil.Process().memory_info().rss + NOISE_BYTES
        blocks = [libc.malloc(BLOCK_BYTES) for _ in range(BLOCKS)]
        for block in blocks:
            ctypes.memset(block, 1, BLOCK_BYTES)
        assert psutil.Process().memory_info().rss > most
        for block in blocks[:-1]:
            libc.free(block)
        wait_until(lambda: psutil.Process().memory_info().rss < most)  # noqa: B023 (called at once)
        libc.free(blocks[-1])
    memory.stop()
