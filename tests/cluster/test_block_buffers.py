"""Buffers for disk reads: aligned, reused and bounded."""

import numpy as np

from kvstore_cluster.block_buffers import BlockBuffers
from kvstore_cluster.disk.record import BLOCK_BYTES


def address(view: memoryview) -> int:
    return int(np.frombuffer(view, np.uint8).ctypes.data)


def lent(buffers: BlockBuffers, size_bytes: int, *, needed: bool = False) -> memoryview:
    buffer = buffers.take(size_bytes, needed=needed)
    assert buffer is not None
    return buffer


def test_buffers_are_aligned_and_reused() -> None:
    buffers = BlockBuffers()
    first = lent(buffers, 100_000)
    assert first.nbytes >= 100_000
    assert address(first) % BLOCK_BYTES == 0
    where = address(first)
    buffers.give_back(first)
    assert address(lent(buffers, 70_000)) == where


def test_what_is_lent_is_bounded_but_everybody_gets_one() -> None:
    buffers = BlockBuffers(limit_bytes=256 << 10)
    held = [lent(buffers, 64 << 10) for _ in range(4)]
    assert buffers.take(1, needed=False) is None
    extra = lent(buffers, 1, needed=True)
    assert buffers.lent_bytes == 5 * (64 << 10)
    for buffer in (*held, extra):
        buffers.give_back(buffer)
    assert buffers.lent_bytes == 0
    assert buffers.take(256 << 10, needed=False) is not None  # smaller free ones make room


def test_free_buffers_count_against_the_limit() -> None:
    buffers = BlockBuffers(limit_bytes=256 << 10)
    for size_bytes in (64 << 10, 128 << 10, 256 << 10):
        buffers.give_back(lent(buffers, size_bytes))
    assert buffers.kept_bytes <= 256 << 10
